"""Measurements of prefill that ``examples/prefill_results.py`` writes: reading, and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .table import Table

HOW = "give a file that examples/prefill_results.py wrote"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: ``speed``, ``loss`` or ``recall``.
        model: The model's name.
        tokens: Of the prompt.
        way: ``stock``, ``exact`` or ``tiles:0.95``.
        number: Of the round, the window of the text or the sample.
        values: What was found.
    """

    part: str
    model: str
    tokens: int
    way: str
    number: int
    values: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells measurements apart."""
        return self.part, self.model, self.tokens, self.way, self.number

    def to_dict(self) -> dict[str, Any]:
        """A line of the file."""
        return asdict(self)


def read_rows(path: str | Path) -> list[Row]:
    """All whole lines of a file; the last one may have been cut off.

    Raises:
        OSError: It can't be read.
        ValueError: It is another file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = (error.strerror or "it can't be read").lower()
        raise OSError(f"[read_rows] {path}: {reason}; {HOW}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"[read_rows] {path} is not text; {HOW}.") from error
    rows = []
    for i, line in enumerate(lines):
        try:
            values = json.loads(line)
            row = Row(**values)
            if not isinstance(row.values, dict) or not isinstance(row.tokens, int):
                raise TypeError
        except (ValueError, TypeError) as error:
            if i == len(lines) - 1 and i:
                break
            raise ValueError(
                f"[read_rows] {path} line {i + 1} is no measurement; {HOW}."
            ) from error
        rows.append(row)
    return rows


def tables(rows: Sequence[Row]) -> list[Table]:
    """Speed and loss of each model, and recall."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        if any(row.part == "speed" for row in own):
            found.append(_speed_table(model, own))
        if any(row.part in ("loss", "recall") for row in own):
            found.append(_loss_table(model, own))
    return found


def mean(rows: Iterable[Row], part: str, tokens: int, way: str, name: str) -> float | None:
    """The mean of a value over rounds, windows or samples; ``None`` where there is none."""
    values = [
        row.values[name]
        for row in rows
        if (row.part, row.tokens, row.way) == (part, tokens, way)
        and row.values.get(name) is not None
    ]
    return statistics.fmean(values) if values else None


def _speed_table(model: str, rows: Sequence[Row]) -> Table:
    header = ["tokens", "way", "seconds", "processor seconds", "of stock's speed", "density"]
    header += ["MB beside the weights", "rounds"]
    lines = []
    for tokens in sorted({row.tokens for row in rows if row.part == "speed"}):
        base = mean(rows, "speed", tokens, "stock", "processor_seconds")
        for way in _ways(rows, "speed", tokens):
            work = mean(rows, "speed", tokens, way, "processor_seconds")
            clock = mean(rows, "speed", tokens, way, "seconds")
            peak = mean(rows, "speed", tokens, way, "peak_bytes")
            density = mean(rows, "speed", tokens, way, "density")
            rounds = len([r for r in rows if r.key[:4] == ("speed", model, tokens, way)])
            assert work is not None and clock is not None
            lines.append(
                [
                    f"{tokens}",
                    way,
                    f"{clock:.1f}",
                    f"{work:.1f}",
                    "–" if base is None else f"{base / work:.2f}",
                    "–" if density is None else f"{density:.3f}",
                    "–" if peak is None else f"{peak / 1e6:.0f}",
                    f"{rounds}",
                ]
            )
    return Table(f"Prefill of {model}: time and memory", header, lines)


def _loss_table(model: str, rows: Sequence[Row]) -> Table:
    header = ["tokens", "way", "density", "KL at the end", "KL after the prompt"]
    header += ["other first token after", "windows", "recall"]
    lines = []
    for tokens in sorted({row.tokens for row in rows if row.part != "speed"}):
        for way in dict.fromkeys([*_ways(rows, "recall", tokens), *_ways(rows, "loss", tokens)]):
            names = ("density", "end_kl", "after_kl", "after_flips")
            values = [mean(rows, "loss", tokens, way, name) for name in names]
            digits = (3, 5, 5, 3)
            windows = len([r for r in rows if r.key[:4] == ("loss", model, tokens, way)])
            answers = [
                right
                for row in rows
                if row.key[:4] == ("recall", model, tokens, way)
                for right in row.values["right"].values()
            ]
            lines.append(
                [
                    f"{tokens}",
                    way,
                    *(
                        "–" if v is None else f"{v:.{d}f}"
                        for v, d in zip(values, digits, strict=True)
                    ),
                    f"{windows}" if windows else "–",
                    f"{sum(answers)} of {len(answers)}" if answers else "–",
                ]
            )
    return Table(f"Prefill of {model}: what it loses", header, lines)


def _ways(rows: Iterable[Row], part: str, tokens: int) -> list[str]:
    """Ways measured, stock and exact first."""
    known = dict.fromkeys(r.way for r in rows if r.part == part and r.tokens == tokens)
    return sorted(known, key=lambda way: (way not in ("stock", "exact"), way != "stock", way))
