"""Timing settings that take turns, through mlx-lm's own generation.

Machines speed up and slow down. In every round each setting runs once, in an order drawn anew, so
that a slow minute hits all settings alike; the first round warms up and is not counted.
"""

from __future__ import annotations

import importlib
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_delta.measure.filling import check_context, generation_steps, memory_needed
from mlx_delta.measure.operations import decode_operations
from mlx_delta.measure.settings import PREFILL_STEP, Setting, cache_nbytes, scratch_nbytes
from mlx_delta.measure.sparsity import measure_density
from mlx_delta.measure.traffic import Traffic, decode_traffic
from mlx_delta.system.chips import physical_memory

# ``import mlx_lm.generate`` would give the function of that name.
_mlx_lm = importlib.import_module("mlx_lm.generate")


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        first_token: Seconds until the first token was there: the prefill, and one decode step.
        tokens: Seconds for each of the tokens after the first.
        peak_bytes: The most memory that MLX held, weights included.
        prompt_bytes: The most until the first token was there, above what was held before.
    """

    first_token: float
    tokens: tuple[float, ...]
    peak_bytes: int
    prompt_bytes: int = 0

    @property
    def decode(self) -> float:
        """Seconds for the tokens after the first."""
        return sum(self.tokens)


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: median, quartiles, least, greatest and number."""

    median: float
    q1: float
    q3: float
    least: float
    greatest: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles interpolate between neighbouring values."""
        least, q1, median, q3, greatest = (
            float(x) for x in np.percentile(list(values), [0, 25, 50, 75, 100])
        )
        return cls(median, q1, q3, least, greatest, len(values))

    def to_dict(self) -> dict[str, float]:
        """The figures as plain JSON values."""
        return {
            "median": self.median,
            "q1": self.q1,
            "q3": self.q3,
            "min": self.least,
            "max": self.greatest,
            "n": self.n,
        }


@dataclass(frozen=True)
class Tail:
    """What most tokens take, and what the few do that take longer.

    Attributes:
        median: Half of them take no more.
        p95: 95 of 100 take no more.
        greatest: None takes more.
        n: Tokens.
    """

    median: float
    p95: float
    greatest: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Tail:
        """Quantiles interpolate between neighbouring values."""
        median, p95, greatest = (float(x) for x in np.percentile(list(values), [50, 95, 100]))
        return cls(median, p95, greatest, len(values))

    def to_dict(self) -> dict[str, float]:
        """The figures as plain JSON values."""
        return {"median": self.median, "p95": self.p95, "max": self.greatest, "n": self.n}


@dataclass
class Row:
    """What was measured of a setting at a context.

    Attributes:
        setting: The way to keep keys and values.
        context: Tokens in the cache at the end: prompt and generated.
        generated: How many of them were generated.
        runs: The runs that count.
        traffic: What decoding a token takes at the end of the context; computed.
        cache_bytes: What the caches have allocated then, floats at 16 bits.
        scratch_bytes: What they keep written out besides, where no kernel reads stored keys.
        operations: In the graph of each of ``generated`` tokens after the context.
        density: Of a prefill by tiles: the part of them that was computed.
    """

    setting: Setting
    context: int
    generated: int
    runs: list[Run] = field(default_factory=list)
    traffic: Traffic | None = None
    cache_bytes: int = 0
    scratch_bytes: int = 0
    operations: list[int] = field(default_factory=list)
    density: float | None = None

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.context - self.generated

    @property
    def prefill_speed(self) -> Spread:
        """Tokens of the prompt per second until the first token, as mlx-lm counts them."""
        return Spread.of([self.prompt / run.first_token for run in self.runs])

    @property
    def decode_speed(self) -> Spread:
        """Tokens per second after the first."""
        return Spread.of([(self.generated - 1) / run.decode for run in self.runs])

    @property
    def first_token(self) -> Spread:
        """Seconds until the first token."""
        return Spread.of([run.first_token for run in self.runs])

    @property
    def token_seconds(self) -> Tail:
        """Seconds for a token after the first, over all tokens of all runs."""
        return Tail.of([seconds for run in self.runs for seconds in run.tokens])

    @property
    def token_operations(self) -> Tail:
        """Operations in the graph of a token."""
        return Tail.of(self.operations)

    @property
    def peak_bytes(self) -> int:
        """The most memory that MLX held in any run."""
        return max(run.peak_bytes for run in self.runs)

    @property
    def prompt_bytes(self) -> int:
        """The most memory that reading the prompt took above the weights, in any run."""
        return max(run.prompt_bytes for run in self.runs)

    def bandwidth_share(self, gb_per_s: float) -> float:
        """Share of a chip's bandwidth that decode reached: bytes read per second / bandwidth."""
        assert self.traffic is not None
        return self.traffic.bytes * self.decode_speed.median / (gb_per_s * 1e9)


class Benchmark:
    """Settings side by side, context after context.

    Args:
        model: From :func:`mlx_delta.load`, with a delta.
        settings: To take turns.
        tokens: Prompts are the first of these.
        contexts: Tokens in the cache at the end of each run.
        generated: How many of a context's tokens are decoded, at least 2; the rest is prompt.
        trials: Rounds that count.
        seed: Draws the order within each round.
        prefill_step: Tokens of a prompt at a time.
        delay: Seconds of rest before each run.

    Attributes:
        rows: What was measured so far; complete rows and, after an interruption, shorter ones.
        notes: What was left out, and why.

    Raises:
        ValueError: An argument makes no sense, or a context is longer than the tokens or the
            model's context.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Sequence[Setting],
        tokens: Sequence[int],
        contexts: Sequence[int],
        generated: int = 64,
        trials: int = 5,
        seed: int = 0,
        prefill_step: int = PREFILL_STEP,
        delay: float = 0.0,
    ):
        if not settings:
            raise ValueError("[Benchmark] settings is empty; name at least one, such as 'dense'.")
        if generated < 2:
            raise ValueError(
                f"[Benchmark] generated must be >= 2, the first to time the prompt, but got "
                f"{generated}."
            )
        for name, value in (("trials", trials), ("prefill_step", prefill_step)):
            if value < 1:
                raise ValueError(f"[Benchmark] {name} must be >= 1 but got {value}.")
        for context in contexts:
            check_context("Benchmark", model, context)
            if context <= generated:
                raise ValueError(
                    f"[Benchmark] a context of {context} tokens has no room for a prompt and "
                    f"{generated} generated tokens; ask for a longer one or fewer tokens."
                )
            if context - generated > len(tokens):
                raise ValueError(
                    f"[Benchmark] a context of {context} tokens needs {context - generated} "
                    f"tokens of prompt but got {len(tokens)}."
                )
        self.model = model
        self.settings = list(settings)
        self.tokens = list(tokens)
        self.contexts = list(contexts)
        self.generated = generated
        self.trials = trials
        self.seed = seed
        self.prefill_step = prefill_step
        self.delay = delay
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def run(self, progress: bool = False) -> list[Row]:
        """Measure everything; ``rows`` fill up as it goes, so an interruption loses nothing."""
        total = len(self.contexts) * (self.trials + 1) * len(self.settings)
        with tqdm(total=total, unit="run", disable=None if progress else True) as bar:
            for context in self.contexts:
                rows = self._rows(context)
                bar.update((len(self.settings) - len(rows)) * (self.trials + 1))
                for turn in range(self.trials + 1):
                    for row in round_order(rows, self.seed, context, turn):
                        bar.set_description(f"{context} tokens, {row.setting.name}")
                        self._turn(row, warm_up=turn == 0)
                        bar.update()
        return self.rows

    def _rows(self, context: int) -> list[Row]:
        """New rows for a context, without those that memory can't hold."""
        rows = []
        for setting in self.settings:
            needed = memory_needed(self.model, setting, context, self.prefill_step)
            if needed > physical_memory():
                self.notes.append(
                    f"{setting.name} at {context} tokens was left out: it takes about "
                    f"{needed / 1e9:.0f} GB and this machine has {physical_memory() / 1e9:.0f} GB."
                )
                continue
            rows.append(Row(setting, context, self.generated))
        self.rows += rows
        return rows

    def _turn(self, row: Row, warm_up: bool) -> None:
        time.sleep(self.delay)
        prompt = self.tokens[: row.prompt]
        run, caches = time_once(self.model, row.setting, prompt, row.generated, self.prefill_step)
        if not warm_up:
            row.runs.append(run)
            return
        row.traffic = decode_traffic(self.model, caches)
        row.cache_bytes, row.scratch_bytes = cache_nbytes(caches), scratch_nbytes(caches)
        row.density = measure_density(caches)
        row.operations = decode_operations(self.model, caches, row.generated)


def round_order(rows: Sequence[Any], seed: int, context: int, turn: int) -> list[Any]:
    """The rows in the order of a round: random, and the same for the same numbers."""
    return random.Random(f"{seed}/{context}/{turn}").sample(list(rows), len(rows))


def time_once(
    model: nn.Module,
    setting: Setting,
    prompt: Sequence[int],
    generated: int,
    prefill_step: int = PREFILL_STEP,
) -> tuple[Run, list[Any]]:
    """Generate once, as mlx-lm does for a user: sampling and asynchronous evaluation included.

    Returns:
        The times, and the caches, which hold the prompt and all generated tokens.
    """
    caches = setting.make_caches(model, len(prompt))
    ids = mx.array(list(prompt))
    mx.eval(ids)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before, prompt_bytes = mx.get_active_memory(), 0
    times = []
    with _mlx_lm.wired_limit(model, [_mlx_lm.generation_stream]):
        start = time.perf_counter()
        for _ in generation_steps(model, setting, ids, caches, generated, prefill_step):
            times.append(time.perf_counter())
            prompt_bytes = prompt_bytes or mx.get_peak_memory() - before
    tokens = tuple(after - before for before, after in itertools.pairwise(times))
    run = Run(times[0] - start, tokens, mx.get_peak_memory(), prompt_bytes)
    # The step after the last token is under way: it completes the context.
    mx.eval([cache.state for cache in caches])
    return run, caches
