"""Measuring which path decode attention should take on this machine, shape by shape.

One layer's attention to one query, of a cache filled with random keys and values of the model's
shape, the update of the cache included: by each path, and by MLX's own attention over a dense
cache. Several of them in a row are evaluated together, as the layers of a model are, so that what
is measured is not the waiting for each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from tqdm import tqdm

from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.cache import DeltaKVCache
from mlx_delta.config import DeltaConfig
from mlx_delta.measure.table import Table
from mlx_delta.models.anatomy import Heads, trace_heads
from mlx_delta.models.common import model_setting
from mlx_delta.system.kv import SMALLER, kv_fields
from mlx_delta.system.memory import free_memory
from mlx_delta.system.tuning import (
    DENSE,
    NOISE,
    PATHS,
    Shape,
    Tuning,
    by_path,
    store_name,
)

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
LAYERS = 8  # attentions evaluated together
ROUNDS = 7  # of which the median counts
CHUNK = 2048  # tokens by which caches are filled
NOTHING = (
    "There is nothing to choose without a GPU: stored keys are kept written out while "
    "tokens are decoded, and attended to by MLX's own attention. No table is written."
)


@dataclass
class Tried:
    """What is measured of a shape: caches that grow from length to length.

    Attributes:
        shape: Of the table.
        config: How one layer stores keys and values.
        heads: Of a layer.
        dtype: The model's type.
    """

    shape: Shape
    config: DeltaConfig
    heads: Heads
    dtype: mx.Dtype
    cache: DeltaKVCache = field(init=False)
    dense: KVCache = field(default_factory=KVCache)

    def __post_init__(self) -> None:
        """Begin with empty caches."""
        self.cache = DeltaKVCache(self.config)

    def fill(self, tokens: int) -> None:
        """Let both caches have so many tokens: more, or back by what was measured with them."""
        more = self.cache.size() - tokens
        if more > 0:
            self.cache.trim(min(more, self.cache.exact_trim()))
        self.dense.trim(max(0, self.dense.offset - self.cache.size()))
        while self.cache.size() < tokens:
            new = self._new(min(CHUNK, tokens - self.cache.size()))
            self.cache.updates(*new)
            self.dense.update_and_fetch(*new)
            mx.eval(self.cache.state, self.dense.state)

    def attend(self, path: str) -> mx.array:
        """One token's attention by a path; the cache has one more then."""
        keys, values = self._new(1)
        shape = (1, self.heads.queries, 1, self.heads.key_dim)
        queries = mx.random.normal(shape, dtype=self.dtype)
        scale = self.heads.key_dim**-0.5
        if path == DENSE:
            keys, values = self.dense.update_and_fetch(keys, values)
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)
        with by_path(path):
            return delta_attention(queries, keys, values, self.cache, scale)

    def _new(self, tokens: int) -> tuple[mx.array, mx.array]:
        keys = (1, self.heads.kv_heads, tokens, self.heads.key_dim)
        values = (*keys[:3], self.heads.value_dim)
        return (
            mx.random.normal(keys, dtype=self.dtype),
            mx.random.normal(values, dtype=self.dtype),
        )


def tried_shapes(model: nn.Module) -> list[Tried]:
    """What a model's layers can store their keys and values in, each shape once."""
    own = model_setting(model) or DeltaConfig()
    dtype = _float_type(model)
    settings = []
    for fields in (
        *map(kv_fields, SMALLER),
        {"key_format": "deltas", "key_bits": 4, "value_bits": 4},
    ):
        with suppress(ValueError):  # a chain can't be stored
            settings.append(own.changed(**fields))
    found: dict[Shape, Tried] = {}
    layers = trace_heads(model)
    for index, heads in enumerate(layers):
        for setting in settings if heads is not None else ():
            assert heads is not None
            config = setting.for_layer(index, len(layers))
            shape = Shape(store_name(config), heads.queries, heads.kv_heads, heads.key_dim)
            tried = Tried(shape, config, heads, dtype)
            with suppress(ValueError):  # a dimension that has no codes
                if shape not in found:
                    tried.fill(1)
                    found[shape] = tried
    return list(found.values())


def _float_type(model: nn.Module) -> mx.Dtype:
    """The type that the model computes in: of its first norm, or what floats it has."""
    kinds = (mx.float16, mx.bfloat16)
    parameters: Any = tree_flatten(model.parameters())
    return next((w.dtype for _, w in parameters if w.dtype in kinds), mx.float16)


def seconds_of(
    tried: Tried,
    path: str,
    clock: Callable[[], float] = time.perf_counter,
    layers: int = LAYERS,
    rounds: int = ROUNDS,
) -> float:
    """Seconds of one attention by a path: the median of rounds."""
    return statistics.median(times_of(tried, path, clock, layers, rounds))


def times_of(
    tried: Tried,
    path: str,
    clock: Callable[[], float] = time.perf_counter,
    layers: int = LAYERS,
    rounds: int = ROUNDS,
) -> list[float]:
    """Seconds of one attention by a path in each round, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        begun = clock()
        mx.eval([tried.attend(path) for _ in range(layers)])
        times.append((clock() - begun) / layers)
    return times[1:]


def tune(
    shapes: Sequence[Tried],
    lengths: Sequence[int] = LENGTHS,
    measure: Callable[[Tried, str], float] = seconds_of,
    progress: bool = False,
) -> Iterator[Tuning]:
    """The table after each shape and length: it grows, so that an interruption loses little."""
    table = Tuning()
    bar = tqdm(total=len(shapes) * len(lengths), unit="case", disable=None if progress else True)
    with bar:
        for tried in shapes:
            for tokens in sorted(lengths):
                if _bytes(tried, tokens) > free_memory(0)[0]:
                    break
                bar.set_description(f"{tried.shape.store}, {tokens} tokens")
                times = {}
                for path in (DENSE, *PATHS):
                    tried.fill(tokens)
                    times[path] = measure(tried, path)
                table.seconds.setdefault(tried.shape, {})[tokens] = times
                bar.update()
                yield table


def _bytes(tried: Tried, tokens: int) -> int:
    """What a length takes: the dense cache, a copy of each layer in full, and as much again."""
    heads = tried.heads
    return 2 * (LAYERS + 2) * heads.kv_heads * (heads.key_dim + heads.value_dim) * tokens * 4


def tuning_tables(table: Tuning) -> list[Table]:
    """A table for each shape: microseconds of each path, and which is taken."""
    tables = []
    for shape, lengths in table.seconds.items():
        caption = (
            f"{shape.store}: {shape.heads} query heads on {shape.kv_heads} of {shape.head_dim}, "
            "microseconds of a layer and token"
        )
        rows = []
        for tokens, times in lengths.items():
            best = table.best(shape, tokens)
            cells = [f"{times[name] * 1e6:.1f}" for name in (DENSE, *PATHS)]
            share = times[best] / times[DENSE] if best else 0.0
            rows.append([f"{tokens}", *cells, str(best), f"{share:.2f}"])
        header = ["tokens", DENSE, *PATHS, "fastest", "times dense"]
        tables.append(Table(caption, header, rows))
    return tables


def tuning_notes() -> list[str]:
    """What the columns of the tables mean."""
    return [
        f"Medians of {ROUNDS} rounds, {LAYERS} attentions each, over random keys and values; the "
        "update of the cache included. dense: MLX's own attention over keys and values in full.",
        "The fastest path is taken from now on, at lengths near those measured, for one query of "
        "one text; MLX_DELTA_TUNING=off lets no table count.",
    ]


def said_of_default(table: Tuning) -> list[str]:
    """What the table means for a user who names no setting."""
    store = store_name(DeltaConfig().changed(**kv_fields("balanced")))
    ratios = [table.times_dense(shape) for shape in table.seconds if shape.store == store]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known or len(known) < len(ratios):
        return []
    most = max(known)
    verdict = (
        "so calibrated models keep keys and values as --kv balanced where nothing else is asked for"
        if most <= NOISE
        else "so keys and values stay in full where nothing else is asked for"
    )
    return [f"--kv balanced takes at most {most:.2f} times dense attention's time: {verdict}."]
