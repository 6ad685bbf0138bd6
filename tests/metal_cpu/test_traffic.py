"""Byte counts: what kernels load from and store to device memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .bench import KernelSource, MetalBench, Outputs
from .launch import Traffic


def run(bench: MetalBench, body: str, size: int = 64, group: int = 32) -> Outputs:
    kernel = KernelSource("traffic", ["x", "few"], ["out"], body)
    return bench.run(
        kernel,
        inputs=[mx.arange(64).astype(mx.float32), mx.zeros((2,), mx.float16)],
        grid=(size, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        mode="checked",
        seed=1,
    )


def test_each_element_once(bench: MetalBench) -> None:
    traffic = run(bench, "uint i = thread_position_in_grid.x; out[i] = x[i];").traffic
    assert traffic["x"] == Traffic(256, 256, 256, 0, 0)
    assert traffic["out"] == Traffic(0, 0, 0, 256, 256)
    assert traffic["few"] == Traffic()


def test_shared_element(bench: MetalBench) -> None:
    traffic = run(bench, "out[thread_position_in_grid.x] = x[5] + float(few[1]);").traffic
    assert traffic["x"] == Traffic(loaded=256, loaded_distinct=4, loaded_per_threadgroup=8)
    assert traffic["few"] == Traffic(loaded=128, loaded_distinct=2, loaded_per_threadgroup=4)


def test_value_kept_in_a_register_is_loaded_once(bench: MetalBench) -> None:
    body = """uint i = thread_position_in_grid.x;
        float v = x[i];
        for (int k = 0; k < 8; k++) v += v;
        out[i] = v;"""
    assert run(bench, body).traffic["x"].loaded == 256


def test_values_loaded_again_are_counted_again(bench: MetalBench) -> None:
    body = """uint i = thread_position_in_grid.x;
        threadgroup float b[32];
        float v = 0;
        for (int k = 0; k < 4; k++) {
          b[i % 32] = x[i];
          threadgroup_barrier(mem_flags::mem_threadgroup);
          v += b[31 - i % 32];
          threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        out[i] = v;"""
    result = run(bench, body)
    assert result.traffic["x"] == Traffic(4 * 256, 256, 256, 0, 0)
    assert result.threadgroup_bytes == 128 and set(result.traffic) == {"x", "few", "out"}


def test_vector_loads(bench: MetalBench) -> None:
    body = """uint i = thread_position_in_grid.x;
        float4 v = ((const device float4*)x)[i];
        ((device float4*)out)[i] = v.wzyx;"""
    traffic = run(bench, body, size=16).traffic
    assert traffic["x"].loaded == traffic["out"].stored == 256


def test_rewritten_output(bench: MetalBench) -> None:
    body = "uint i = thread_position_in_grid.x; out[i] = 1; out[i] += x[i];"
    traffic = run(bench, body).traffic["out"]
    assert traffic.stored_distinct == 256 and traffic.stored in (256, 512)


def test_fast_mode_counts_nothing(bench: MetalBench) -> None:
    kernel = KernelSource("traffic", [], ["out"], "out[thread_position_in_grid.x] = 1;")
    call: dict[str, Any] = {"grid": (4, 1, 1), "threadgroup": (4, 1, 1), "inputs": []}
    out = bench.run(kernel, **call, output_shapes=[(4,)], output_dtypes=[mx.float32])
    assert out.traffic == {} and len(out) == 1
