"""Reading the results files that ``python -m mlx_delta.evaluate`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_delta.measure.results_file import read_results
from mlx_delta.wording import nearest

from . import names

SPARSITIES = ("prefill", "decode", "overall")


@dataclass(frozen=True)
class Run:
    """One setting measured on one task.

    Attributes:
        model: The model's name.
        fingerprint: What tells models of one name apart.
        task: The task's name.
        setting: The setting as it was written.
        kind: The setting's kind, one of :data:`mlx_delta.measure.settings.KINDS`.
        delta: The setting of the delta, as in a config.json; empty without one.
        date: YYYY-MM-DD.
        metric: What the score is.
        higher_is_better: Whether a higher score is.
        score: The mean.
        interval: Its lower and upper bound.
        samples: How many it is the mean of.
        sparsity: ``prefill``, ``decode`` and ``overall``, as fractions of 1; those known.
        heads: Prefill sparsity [layers, kv heads], or None.
        cache_bytes: Bytes of the cache at the end, or None.
        metrics: What else the task found.
    """

    model: str
    fingerprint: str
    task: str
    setting: str
    kind: str
    delta: dict[str, Any]
    date: str
    metric: str
    higher_is_better: bool
    score: float
    interval: tuple[float, float]
    samples: int
    sparsity: dict[str, float]
    heads: np.ndarray | None
    cache_bytes: int | None
    metrics: dict[str, float]

    @property
    def family(self) -> str:
        """What colour and marker stand for."""
        return names.family(self.setting, self.delta)

    @property
    def label(self) -> str:
        """The setting in a few characters."""
        return names.label(self.setting, self.delta)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in results files, in order.

    Raises:
        OSError: There is no such file.
        ValueError: A file is not a results file, or two hold the same run.
    """
    runs: list[Run] = []
    where: dict[tuple[str, ...], str] = {}
    for path in paths:
        for run in _read(Path(path)):
            key = (run.model, run.fingerprint, run.task, run.setting)
            if key in where:
                raise ValueError(
                    f"[read_runs] {run.task} with {run.setting!r} is in {where[key]} and in "
                    f"{path}; give one of them."
                )
            where[key] = str(path)
            runs.append(run)
    return runs


def choose(runs: Sequence[Run], attribute: str, names: Sequence[str] | None) -> list[Run]:
    """The runs whose ``task`` or ``setting`` is one of these names, in the names' order.

    Raises:
        ValueError: There is none of a name; the message has the nearest ones.
    """
    if not names:
        return list(runs)
    known = list(dict.fromkeys(getattr(run, attribute) for run in runs))
    for name in names:
        if name not in known:
            raise ValueError(
                f"[choose] the results have no {attribute} {name!r}{nearest(name, known)}; they "
                f"have {', '.join(known)}."
            )
    return [run for name in names for run in runs if getattr(run, attribute) == name]


def _read(path: Path) -> list[Run]:
    content = read_results(path)
    try:
        # A run that has only begun has no summary yet.
        runs = [_run(content["model"], run) for run in content["runs"] if run["summary"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"a run lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"[read_runs] {path} is not a whole results file: {missing}.") from error
    if not runs:
        raise ValueError(f"[read_runs] {path} has no results yet; let mlx_delta.evaluate go on.")
    return runs


def _run(model: dict[str, Any], run: dict[str, Any]) -> Run:
    summary = run["summary"]
    heads = np.array(summary.get("prefill_heads") or [], np.float64)
    sparsity = {name: summary.get(f"{name}_sparsity") for name in SPARSITIES}
    size = summary.get("cache_bytes")
    return Run(
        model=str(model["name"]),
        fingerprint=str(model.get("fingerprint", "")),
        task=str(run["task"]),
        setting=str(run["setting"]),
        kind=str(run["kind"]),
        delta=dict(run.get("delta") or {}),
        date=str(run.get("date", "")),
        metric=str(summary["metric"]),
        higher_is_better=bool(summary["higher_is_better"]),
        score=float(summary["score"]),
        interval=(
            float(summary.get("low", summary["score"])),
            float(summary.get("high", summary["score"])),
        ),
        samples=int(summary["samples"]),
        sparsity={name: float(value) for name, value in sparsity.items() if value is not None},
        heads=heads if heads.ndim == 2 and heads.size else None,
        cache_bytes=None if size is None else int(size),
        metrics=dict(summary.get("metrics") or {}),
    )
