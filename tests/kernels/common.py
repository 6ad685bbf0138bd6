"""Running the kernels' launchers on the bench, and keys to run them on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.ops import (
    codes_encode,
    codes_kernel,
    deltas_encode,
    deltas_kernel,
    far_kernel,
    hold_kernel,
    runs_kernel,
    sequence_kernel,
    tiles_kernel,
    values_encode,
)
from mlx_delta.ops.backend import has_kernels

from ..metal_cpu import KernelSource, MetalBench

# Which module builds each kernel.
BUILDERS: dict[str, Any] = {
    "hold_kernel": hold_kernel,
    "codes_kernel": codes_kernel,
    "codes_encode_kernel": codes_encode,
    "combine_kernel": far_kernel,
    "deltas_kernel": deltas_kernel,
    "deltas_encode_kernel": deltas_encode,
    "runs_kernel": runs_kernel,
    "sequence_kernel": sequence_kernel,
    "values_encode_kernel": values_encode,
    "tile_pack_kernel": tiles_kernel,
    "tile_score_kernel": tiles_kernel,
    "tile_attention_kernel": tiles_kernel,
}
TYPES = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}
STORED = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float16"}

# How a kernel is run: fast with inputs at either end of their pages, or followed access by access
# under different schedules.
FAST = [{"placement": "end"}, {"placement": "start"}, {"placement": "unaligned"}]
CHECKED = [{"mode": "checked", "seed": seed} for seed in range(3)]


def name_of(options: dict[str, Any]) -> str:
    """A test's id."""
    return "-".join(str(value) for value in options.values())


every_run = pytest.mark.parametrize("options", [*FAST, *CHECKED], ids=name_of)
fast_runs = pytest.mark.parametrize("options", FAST, ids=name_of)
each_type = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES.keys())
# What is behind the words in use is left as it is.
UNWRITTEN = {"allow_unwritten": True}
_PASSED: set[tuple[str, str, str]] = set()


@contextlib.contextmanager
def on_bench(bench: MetalBench, **options: Any) -> Iterator[None]:
    """The launchers' kernels run on the bench; with a GPU, on that (in fast mode only)."""
    if on_gpu(bench):
        if options.get("mode") == "checked":
            pytest.skip("the GPU does not tell; this runs on Linux")
        yield
        return
    _forget_kernels()
    try:
        with bench.patched(**UNWRITTEN, **options):
            yield
    finally:
        _forget_kernels()


def on_gpu(bench: MetalBench) -> bool:
    """Whether launchers' kernels run on a GPU, Apple's or NVIDIA's."""
    return bench.on_gpu or has_kernels()


def lenient(bench: MetalBench) -> MetalBench:
    """The same bench, without the pass that only looks at the syntax."""
    return MetalBench(bench.compiler, strict=False)


def _forget_kernels() -> None:
    for name, module in BUILDERS.items():
        getattr(module, name).cache_clear()


def source_of(builder: str) -> KernelSource:
    """A kernel as data, to plant mistakes in."""
    return KernelSource.of(getattr(BUILDERS[builder], builder).__wrapped__)


def with_kernel(
    bench: MetalBench, builder: str, test: Callable[[], None]
) -> Callable[[KernelSource], None]:
    """A test of one kernel, which runs in checked mode in the place of the launcher's own."""

    def run(kernel: KernelSource) -> None:
        if on_gpu(bench):
            pytest.skip("the GPU does not check")
        passed = (builder, kernel.header, kernel.source)
        if passed in _PASSED:
            return  # the kernel itself, once more: every mutation asks for it
        # Whether Metal's compiler takes it is a question to the kernel, not to a mistake.
        bound = lenient(bench).bind(kernel, mode="checked", **UNWRITTEN)
        with on_bench(bench), mock.patch.object(BUILDERS[builder], builder, lambda: bound):
            test()
        _PASSED.add(passed)

    return run


def config(**changes: Any) -> DeltaConfig:
    """Blocks held by a threshold, and windows, of 64 unless told otherwise."""
    settings = {"block_size": 64, "window": 64, "sinks": 4, "threshold": 1.0}
    settings |= changes
    return DeltaConfig(**settings)


def walk(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0, step: float = 0.3) -> mx.array:
    """Keys [.., N, D] whose neighbours are alike, around a mean of each channel's own."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(*shape[:-2], 1, shape[-1])) * 2
    noise = np.cumsum(rng.normal(size=shape) * step, axis=-2)
    return mx.array((keys + np.sin(noise)).astype(np.float32)).astype(dtype)


def as_float(array: mx.array) -> np.ndarray:
    """float32, for types that NumPy lacks too."""
    return np.array(array.astype(mx.float32))


def special_keys(kind: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Keys [.., N, D] that are hard to hold or to code."""
    keys = as_float(walk(shape, dtype))
    rng = np.random.default_rng(1)
    if kind == "constant":  # all deltas zero
        keys[...] = keys[..., :1, :]
    elif kind == "alternating":  # none zero
        keys = np.where(np.arange(shape[-2])[:, None] % 2 == 0, 3.0, -3.0) + 0 * keys
    elif kind == "steps":  # whole numbers, so that changes equal to a threshold occur
        keys = rng.integers(-3, 3, shape).astype(np.float32)
    elif kind == "extreme":
        keys = np.where(rng.random(shape) < 0.5, 65504.0, -65504.0)
        keys[..., ::3] *= 1e-9
    elif kind == "nan":
        keys[..., 5, 3] = np.nan
        keys[..., 0, 9] = np.nan
    elif kind == "inf":
        keys[..., 7, 1] = np.inf
        keys[..., 3, 2] = -np.inf
    return mx.array(keys.astype(np.float32)).astype(dtype)
