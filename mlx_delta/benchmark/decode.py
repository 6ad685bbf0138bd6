"""Timing decode alone: settings take turns token by token, over one text that is read once.

Reading a long prompt anew for every run takes most of a benchmark's time and says nothing of
decode. Here the prompt is read once, densely; every setting's caches are filled with copies of its
keys and values, and then all settings decode the text's next tokens, each token by each setting in
an order drawn anew. A slow moment hits all of them alike, so that what is told is a ratio.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from tqdm import tqdm

from mlx_delta.cache import HeldKeys
from mlx_delta.measure.filling import check_context
from mlx_delta.measure.settings import PREFILL_STEP, Setting, cache_nbytes, scratch_nbytes
from mlx_delta.measure.table import Table

from .table import format_spread
from .timing import Spread, round_order


@dataclass
class DecodeRow:
    """What decoding with a setting took at a context.

    Attributes:
        setting: The way to keep keys and values.
        context: Tokens in the cache at the end.
        wall: Seconds of each token.
        processor: Seconds that all threads of the process worked for it.
        cache_bytes: Allocated at the end, floats at 16 bits.
        scratch_bytes: Besides, of what is kept written out between tokens.
    """

    setting: Setting
    context: int
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    scratch_bytes: int = 0

    def seconds(self, clock: str = "wall") -> Spread:
        """Of a token."""
        return Spread.of(getattr(self, clock))

    def times(self, first: DecodeRow, clock: str = "wall") -> Spread:
        """Seconds of each token over those of another setting for the same token."""
        own, other = getattr(self, clock), getattr(first, clock)
        return Spread.of([a / max(b, 1e-9) for a, b in zip(own, other, strict=True)])

    def times_in_all(self, first: DecodeRow, clock: str = "wall") -> float:
        """Seconds of all tokens over the other's: what finishing a block takes included."""
        return sum(getattr(self, clock)) / max(sum(getattr(first, clock)), 1e-9)


def decode_tables(rows: Sequence[DecodeRow]) -> list[Table]:
    """What was timed, a table for each context, each compared with its first setting."""
    tables = []
    for context in dict.fromkeys(row.context for row in rows):
        members = [row for row in rows if row.context == context]
        name = members[0].setting.name
        header = ["setting", "ms/token", f"times {name}", "in all", "processor", "in all"]
        header += ["cache MB", "written out MB"]
        caption = f"{context} tokens: the last {len(members[0].wall)} decoded, token by token"
        tables.append(Table(caption, header, [_line(row, members[0]) for row in members]))
    return tables


def _line(row: DecodeRow, first: DecodeRow) -> list[str]:
    return [
        row.setting.name,
        format_spread(row.seconds(), 1000),
        format_spread(row.times(first)),
        f"{row.times_in_all(first):.2f}",
        format_spread(row.times(first, "processor")),
        f"{row.times_in_all(first, 'processor'):.2f}",
        f"{row.cache_bytes / 1e6:.2f}",
        f"{row.scratch_bytes / 1e6:.2f}",
    ]


def decode_notes(first: str) -> list[str]:
    """What the columns of the tables mean."""
    return [
        "The prompt was read once, densely; each setting's caches hold its keys and values.",
        f"times {first}: median [quartiles] over tokens, by the clock and by the processor's time "
        "of all threads; in all: of their sums, which include finishing a block.",
        "cache MB: allocated, floats at 16 bits. written out MB: in memory besides, at full width, "
        "where no kernel reads stored keys.",
    ]


def decode_values(rows: Sequence[DecodeRow]) -> list[dict[str, Any]]:
    """What was timed as plain JSON values."""
    first: dict[int, DecodeRow] = {}
    values = []
    for row in rows:
        other = first.setdefault(row.context, row)
        entry: dict[str, Any] = {"setting": row.setting.name, "context": row.context}
        for clock in ("wall", "processor"):
            entry[f"{clock}_seconds"] = row.seconds(clock).to_dict()
            entry[f"{clock}_times"] = row.times(other, clock).to_dict()
            entry[f"{clock}_times_in_all"] = row.times_in_all(other, clock)
        values.append({**entry, "cache_bytes": row.cache_bytes, "scratch_bytes": row.scratch_bytes})
    return values


def fill(
    setting: Setting, model: nn.Module, dense: Sequence[Any], tokens: int, step: int = PREFILL_STEP
) -> list[Any]:
    """A setting's caches with the first tokens of dense ones, ``step`` of them at a time."""
    caches = setting.make_caches(model, tokens)
    for i, source in enumerate(dense):
        if not isinstance(source, KVCache):
            caches[i] = copy.deepcopy(source)  # a sliding window or a recurrent state: not ours
            continue
        assert source.keys is not None and source.values is not None
        for start in range(0, tokens, step):
            part = (slice(None), slice(None), slice(start, min(tokens, start + step)))
            put = caches[i].updates if isinstance(caches[i], HeldKeys) else None
            (put or caches[i].update_and_fetch)(source.keys[part], source.values[part])
            mx.eval(caches[i].state)
    setting.settle(caches)
    return caches


class DecodeBenchmark:
    """Decode of settings side by side, context after context.

    Args:
        model: From :func:`mlx_delta.load`, with a delta.
        settings: To take turns; the first is what the others are compared with.
        tokens: The text.
        contexts: Tokens in the cache at the end.
        generated: How many of a context's tokens are decoded and timed.
        seed: Draws the order of the settings at each token.
        step: Tokens of a prompt at a time.
        clocks: Wall clock and processor time, in seconds.

    Attributes:
        rows: What was measured so far.

    Raises:
        ValueError: A context is longer than the tokens or the model's context, or has no room.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Sequence[Setting],
        tokens: Sequence[int],
        contexts: Sequence[int],
        generated: int = 64,
        seed: int = 0,
        step: int = PREFILL_STEP,
        clocks: tuple[Callable[[], float], Callable[[], float]] = (
            time.perf_counter,
            time.process_time,
        ),
    ):
        for context in contexts:
            check_context("DecodeBenchmark", model, context)
            if not generated + 1 < context <= len(tokens):
                raise ValueError(
                    f"[DecodeBenchmark] a context of {context} tokens must have more than the "
                    f"{generated + 1} that are decoded, and at most the text's {len(tokens)}."
                )
        self.model = model
        self.settings = list(settings)
        self.tokens = list(tokens)
        self.contexts = sorted(contexts)
        self.generated = generated
        self.seed = seed
        self.step = step
        self.clocks = clocks
        self.rows: list[DecodeRow] = []

    def run(self, progress: bool = False) -> list[DecodeRow]:
        """Measure everything; after an interruption ``rows`` has what is complete."""
        dense = Setting("dense", "dense")
        caches = dense.make_caches(self.model)
        read = 0
        shown = None if progress else True
        with tqdm(total=max(self.contexts), unit="tok", disable=shown) as bar:
            for context in self.contexts:
                prompt = context - self.generated
                for start in range(read, prompt, self.step):
                    part = self.tokens[start : min(prompt, start + self.step)]
                    mx.eval(self.model(mx.array(part)[None], cache=caches)[:, -1:])
                    bar.update(len(part))
                    read = start + len(part)
                self.rows += self._decode(caches, context)
        return self.rows

    def _decode(self, dense: Sequence[Any], context: int) -> list[DecodeRow]:
        """Rows of one context."""
        prompt = context - self.generated
        rows = [DecodeRow(setting, context) for setting in self.settings]
        caches = [fill(row.setting, self.model, dense, prompt - 1, self.step) for row in rows]
        turns = list(zip(rows, caches, strict=True))
        for row, own in turns:  # not counted: it allocates, and writes out what is stored
            self._token(DecodeRow(row.setting, context), own, self.tokens[prompt - 1])
        for i, token in enumerate(self.tokens[prompt:context]):
            for row, own in round_order(turns, self.seed, context, i):
                self._token(row, own, token)
        for row, own in turns:
            row.cache_bytes = cache_nbytes(own)
            row.scratch_bytes = scratch_nbytes(own)
        return rows

    def _token(self, row: DecodeRow, caches: list[Any], token: int) -> None:
        wall, processor = self.clocks
        begun = wall(), processor()
        mx.eval(self.model(mx.array([[token]]), cache=caches))
        row.wall.append(wall() - begun[0])
        row.processor.append(processor() - begun[1])
