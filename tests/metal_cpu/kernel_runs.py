"""How the tests of known-good kernels run them: every mode, launches and outputs in a word."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

RUNS: list[dict[str, Any]] = [
    {"mode": "fast"},
    {"mode": "fast", "seed": 1},
    *({"mode": "checked", "seed": seed} for seed in range(4)),
]
every_run = pytest.mark.parametrize(
    "options", RUNS, ids=lambda o: f"{o['mode']}-seed{o.get('seed', 0)}"
)


def linear(size: int, group: int = 64) -> dict[str, Any]:
    """The launch of one thread for each of `size` elements."""
    return {"grid": (size, 1, 1), "threadgroup": (group, 1, 1)}


def outputs(*shapes: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> dict[str, Any]:
    return {"output_shapes": list(shapes), "output_dtypes": [dtype] * len(shapes)}


def equal(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and bool(mx.array_equal(a.astype(b.dtype), b))
