"""The kernel delta_hold: blocks held by a threshold, against operations and the specification."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method import attention as ref
from mlx_delta.method.storage import round_to
from mlx_delta.ops import blocks as whole_blocks
from mlx_delta.ops import hold_kernel
from mlx_delta.ops.hold import hold_blocks

from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import (
    UNWRITTEN,
    as_float,
    config,
    every_run,
    on_bench,
    source_of,
    special_keys,
    walk,
    with_kernel,
)

HALVES = {"fp16": mx.float16, "bf16": mx.bfloat16}
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES.keys())
each_run_value = pytest.mark.parametrize("run_value", ["mean", "first"])
SMALL: dict[str, Any] = {"block_size": 16, "window": 0}


def check(keys: mx.array, setting: DeltaConfig, first: int = 0) -> None:
    """Held keys and zeros are those of the operations, bit for bit."""
    held, zeros = hold_kernel.hold(keys, setting, first)
    wanted, wanted_zeros = hold_blocks(keys, setting, first)
    np.testing.assert_array_equal(as_float(held), as_float(wanted))
    np.testing.assert_array_equal(zeros, wanted_zeros)


@every_run
@each_run_value
def test_runs(bench: MetalBench, run_value, options):
    with on_bench(bench, **options):
        check(walk((2, 3, 128, 64), mx.float16), config(sinks=70, run_value=run_value))


@each_half
@each_run_value
@pytest.mark.parametrize(
    ("head_dim", "size"), [(16, 16), (80, 8), (96, 40), (128, 64), (256, 32)], ids=str
)
def test_shapes(bench: MetalBench, dtype, head_dim, size, run_value):
    setting = config(block_size=size, window=0, sinks=3 * size + 2, run_value=run_value)
    with on_bench(bench):
        check(walk((1, 1, 2 * size, head_dim), dtype), setting, 2)


@each_half
@each_run_value
@pytest.mark.parametrize("kind", ["constant", "alternating", "extreme", "nan", "inf"])
def test_special_keys(bench: MetalBench, dtype, kind, run_value):
    with on_bench(bench):
        check(special_keys(kind, (1, 2, 32, 80), dtype), config(**SMALL, run_value=run_value))


@each_run_value
def test_a_text_is_held_as_specified(bench: MetalBench, run_value):
    setting = config(**SMALL, sinks=5, run_value=run_value)
    keys = walk((1, 1, 48, 32), mx.float16)
    with on_bench(bench):
        held, _ = whole_blocks.hold(keys, setting, 0)
    wanted = round_to(ref.hold(as_float(keys[0, 0]), setting), "float16")
    np.testing.assert_array_equal(as_float(held[0, 0]), wanted)


MUTATIONS = [
    without_barrier(1),
    Mutation("threads without a channel", "if (d < D) {\n    float value", "{\n    float value"),
    Mutation("any change counts", "abs(key - value) <= threshold", "key == value"),
    Mutation("below instead of up to", "value) <= threshold", "value) < threshold"),
    Mutation("a NaN is held", "abs(key - value) <= threshold", "!(abs(key - value) > threshold)"),
    Mutation("sinks are held", "t >= sinks && abs", "abs"),
    Mutation("compared with the last key", "value = next;", "value = key;"),
    Mutation("equal keys are no run", "Mean ? keep : next == value", "next == value"),
    Mutation("equal keys are a run", "Mean ? keep : next == value", "keep"),
    Mutation("sinks count as zeros", "t >= counted_from && same", "t > 0 && same"),
    Mutation("tokens of the first word only", "t >= 32 ? 1u << (t - 32) : 0u", "false ? 1u : 0u"),
    Mutation("runs of the first word", "starts.high >> (t - 32)", "starts.low >> (t - 32)"),
    Mutation("sinks are averaged", "t < sinks ? first : first", "first"),
    Mutation("a run past the block's end", "end < Size && !", "!"),
    Mutation("a run past its end", "!starts_at(starts, end)", "true"),
    Mutation("the sum of all, not of differences", "float(keys[end * D + d]) - first", "first"),
    Mutation("no division", "total / float(end - t)", "total"),
    Mutation("the first does not count", "total / float(end - t)", "total / float(end - t - 1)"),
    Mutation("another block's first keys", "int first = (place[0]", "int first = (0 * place[0]"),
    Mutation("zeros of one simdgroup", "i < (D + 31) / 32", "i < 1"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    def cases() -> None:
        keys = walk((1, 2, 16, 80), mx.float16)
        check(keys, config(**SMALL, sinks=3))
        check(keys, config(**SMALL, sinks=3, threshold=0.0, run_value="first"))
        check(walk((1, 1, 64, 16), mx.float16), config(window=0, sinks=67), 1)
        steps = special_keys("steps", (1, 1, 16, 80), mx.float16)
        check(steps, config(**SMALL, threshold=2.0, threshold_mode="absolute"))
        equal = mx.zeros((1, 1, 16, 80), mx.float16)
        for value in ("mean", "first"):
            check(equal, config(**SMALL, sinks=4, run_value=value))
            nan = special_keys("nan", (1, 1, 16, 80), mx.float16)
            check(nan, config(**SMALL, run_value=value))

    assert_caught(source_of("hold_kernel"), mutation, with_kernel(bench, "hold_kernel", cases))


def test_what_it_reads_and_writes(bench: MetalBench):
    """The keys, once from memory, and as many held ones."""
    if bench.on_gpu:
        pytest.skip("the GPU does not count")
    keys, seen = walk((1, 2, 256, 64), mx.float16), {}
    source = source_of("hold_kernel")

    def counting(**call):
        outputs = bench.run(source, mode="checked", **UNWRITTEN, **call)
        seen.update(outputs.traffic)
        return outputs

    with on_bench(bench), pytest.MonkeyPatch.context() as patch:
        patch.setattr(hold_kernel, "hold_kernel", lambda: counting)
        hold_kernel.hold(keys, config(), 0)
    assert seen["keys"].loaded_per_threadgroup == keys.nbytes
    assert seen["held"].stored == keys.nbytes


@pytest.mark.parametrize(
    "keys",
    [
        mx.zeros((1, 16, 32), mx.float16),
        mx.zeros((1, 1, 15, 32), mx.float16),
        mx.zeros((1, 1, 16, 32)),
        mx.zeros((1, 1, 16, 20), mx.float16),
    ],
    ids=["three dimensions", "part of a block", "float32", "head_dim"],
)
def test_what_it_does_not_take(keys):
    with pytest.raises(ValueError, match=r"^\[delta_hold\] "):
        hold_kernel.hold(keys, config(**SMALL), 0)
