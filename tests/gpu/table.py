"""Times of one layer's decode attention from codes, from held keys, and by MLX over all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_delta import DeltaConfig
from mlx_delta.benchmark.tune import LENGTHS, Tried, times_of
from mlx_delta.models.anatomy import Heads
from mlx_delta.system.tuning import DENSE, KERNEL, UNPACK, Shape, store_name

from ..kernels.delta_case import lanes

HEADS = Heads(32, 8, 128, 128)  # as Llama 3 8B has them
STORES: dict[str, DeltaConfig] = {
    "codes": DeltaConfig(
        key_format="codes", key_bits=4, value_format="rotated", value_bits=4
    ).for_layer(0, 1),
    "deltas": lanes((4,) * 16, (4,) * 8),
}


def rows(
    lengths: Sequence[int] = LENGTHS, seconds: float = 120.0, rounds: int = 9
) -> Iterator[dict[str, Any]]:
    """A row for each store, length and path, as long as there is time.

    Args:
        lengths: In tokens.
        seconds: After which no length is begun.
        rounds: For each row.
    """
    begun = time.perf_counter()
    for name, config in STORES.items():
        shape = Shape(store_name(config), HEADS.queries, HEADS.kv_heads, HEADS.key_dim)
        tried = Tried(shape, config, HEADS, mx.float16)
        for tokens in lengths:
            if time.perf_counter() - begun > seconds:
                return
            for path in (DENSE, KERNEL, UNPACK):
                tried.fill(tokens)
                times = [1e6 * t for t in times_of(tried, path, rounds=rounds)]
                yield {
                    "kind": "decode",
                    "store": name,
                    "stored as": shape.store,
                    "heads": [shape.heads, shape.kv_heads, shape.head_dim],
                    "tokens": tokens,
                    "path": path,
                    "us": round(statistics.median(times), 1),
                    "least_us": round(min(times), 1),
                    "most_us": round(max(times), 1),
                }
