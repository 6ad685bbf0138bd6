"""Known-good kernels: right values and no false alarm, in every mode and under many schedules."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from .bench import KernelSource, MetalBench
from .errors import KernelFault
from .kernel_runs import RUNS, equal, every_run, linear, outputs
from .launch import Placement

DTYPES = [
    mx.float32, mx.float16, mx.bfloat16, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32,
    mx.int32, mx.uint64, mx.int64, mx.bool_,
]  # fmt: skip
PLACEMENTS: list[Placement] = ["end", "start", "unaligned"]
# ---- every type, alignment and grid --------------------------------------------------------------

COPY = KernelSource("copy", ["x"], ["out"], "uint i = thread_position_in_grid.x; out[i] = x[i];")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy(bench: MetalBench, dtype: mx.Dtype, placement: Placement) -> None:
    for size in (1, 7, 64, 1000):  # fewer than 8 elements come as `constant`
        x = mx.arange(size).astype(dtype)
        call = outputs(x.shape, dtype=dtype) | linear(size) | {"inputs": [x]}
        assert equal(bench.run(COPY, placement=placement, **call)[0], x)


def test_one_kernel_for_all_types(bench: MetalBench) -> None:
    kernel = COPY.build()
    x = mx.arange(33).astype(mx.bfloat16)
    call = outputs((33,), dtype=mx.bfloat16) | linear(33)
    assert equal(bench.run(kernel, inputs=[x], **call)[0], x)
    assert equal(bench.bind(kernel, mode="checked")(inputs=[x], **call)[0], x)


def test_check_runs_a_kernel_in_every_way(bench: MetalBench) -> None:
    x = mx.arange(100).astype(mx.float16)
    call = outputs((100,), dtype=mx.float16) | linear(100) | {"inputs": [x]}
    out = bench.check(COPY, **call)
    assert equal(out[0], x) and out.traffic["x"].loaded == 200
    with pytest.raises(KernelFault, match="trap: .*misaligned"):
        vectors = "((device half4*)out)[i] = ((const device half4*)x)[i];"
        bench.check(
            COPY.edited(lambda s: s.replace("out[i] = x[i];", vectors)), **call | linear(25)
        )


def test_check_notices_outputs_that_depend_on_the_order(bench: MetalBench) -> None:
    body = """device atomic_uint* count = (device atomic_uint*)out + 64;
        uint place = atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
        out[place] = thread_position_in_grid.x;"""
    kernel = KernelSource("order", [], ["out"], body)
    call = outputs((65,), dtype=mx.uint32) | linear(64) | {"inputs": [], "init_value": 0}
    with pytest.raises(KernelFault, match="output 0 differs when run with"):
        bench.check(kernel, **call)


def test_noncontiguous_input_arrives_in_row_order(bench: MetalBench) -> None:
    x = mx.arange(60).reshape(6, 10).T[::2]
    assert equal(bench.run(COPY, inputs=[x], **outputs(x.shape), **linear(30))[0], x)


@every_run
def test_grid_that_does_not_divide_evenly(bench: MetalBench, options: dict[str, Any]) -> None:
    body = """uint3 g = thread_position_in_grid, n = threads_per_grid;
        uint3 p = threadgroup_position_in_grid * dispatch_threads_per_threadgroup
                  + thread_position_in_threadgroup;
        uint3 s = threads_per_threadgroup;
        uint index = thread_position_in_threadgroup.x + s.x * (thread_position_in_threadgroup.y
                     + s.y * thread_position_in_threadgroup.z);
        bool same = all(p == g) && index == thread_index_in_threadgroup
            && index == simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup
            && threadgroups_per_grid.x == 2
            && simdgroups_per_threadgroup == (s.x * s.y * s.z + 31) / 32;
        uint edge = g.x >= 8 ? 3 : 8;
        out[(g.z * n.y + g.y) * n.x + g.x] = same && s.x == edge && simd_sum(1) <= 32;"""
    kernel = KernelSource("grid", [], ["out"], body)
    shape: dict[str, Any] = {"grid": (11, 5, 3), "threadgroup": (8, 4, 2)}
    out = bench.run(kernel, inputs=[], **shape, **outputs((3, 5, 11), dtype=mx.uint8), **options)
    assert equal(out[0], mx.ones((3, 5, 11), mx.uint8))


def test_shape_strides_and_scalars(bench: MetalBench) -> None:
    body = """uint i = thread_position_in_grid.x;
        auto at = elem_to_loc(i, x_shape, x_strides, x_ndim);
        out[i] = x[at] * scale + N + (Flag ? x_shape[1] : 0) + x_strides[0] + y_ndim;"""
    kernel = KernelSource("metadata", ["x", "scale", "y"], ["out"], body)
    x = mx.arange(24).astype(mx.float32).reshape(2, 3, 4)
    call: dict[str, Any] = {
        "inputs": [x, 0.5, mx.zeros((2, 5))],
        "template": [("N", -3), ("Flag", True)],
    }
    out = bench.run(kernel, **call, **outputs(x.shape), **linear(24))
    assert equal(out[0], x * 0.5 - 3 + 3 + 12 + 2)


def test_init_value_and_atomics(bench: MetalBench) -> None:
    body = """uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&out[i % 4], x[i], memory_order_relaxed);"""
    kernel = KernelSource("histogram", ["x"], ["out"], body, atomic_outputs=True)
    call: dict[str, Any] = {"inputs": [mx.arange(100).astype(mx.float32)], "init_value": 10}
    for options in RUNS:
        out = bench.run(kernel, **call, **outputs((4,)), **linear(100, 32), **options)
        assert equal(out[0], mx.arange(100).reshape(25, 4).sum(0).astype(mx.float32) + 10)


# ---- arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_every_operation_rounds_to_its_type(bench: MetalBench, dtype: mx.Dtype) -> None:
    body = "uint i = thread_position_in_grid.x; out[i] = x[i] * x[i] + x[i] / x[63 - i] - x[i];"
    x = mx.random.normal((64,), key=mx.random.key(0)).astype(dtype)
    kernel = KernelSource("round", ["x"], ["out"], body)
    out = bench.run(kernel, inputs=[x], **outputs((64,), dtype=dtype), **linear(64))
    assert equal(out[0], x * x + x / x[::-1] - x)


EXPRESSIONS = {
    "bits": ("popcount(0xF0Fu) + ctz(8u) + clz(1u) + clz(uchar(1)) + ctz(0u)", 8 + 3 + 31 + 7 + 32),
    "extract": ("extract_bits(0xABCDu, 4, 8) + extract_bits(int(0xF0), 4, 4)", 0xBC - 1),
    "insert-reverse": ("insert_bits(0u, 3u, 4, 2) + reverse_bits(1u << 31) + rotate(1u, 33u)", 51),
    "sums-of-kinds": ("float(half(2) * half(0.5)) + as_type<float>(0x40000000u) + 5 / 2", 5),
    "common": ("clamp(7, 0, 5) + abs(-2) + max3(1, 5, 3) + sign(-2.0f) + mulhi(1u << 31, 4u)", 13),
    "select": ("select(1.f, 2.f, true) + fma(2.f, 3.f, 1.f) + floor(-.5f) + fmod(7.f, 4.f)", 11),
    "vectors": (
        "dot(float4(1, 2, 3, 4), float4(2)) + float3(float2(1), 3).zyx[0] + vec<int, 2>(4, 5)[1]",
        28,
    ),
    "comparisons": ("all(int2(1, 2) < int2(2, 3)) + any(bool2(false)) + select(int2(1), int2(7), "
                    "int2(1, 2) == int2(1))[0]", 8),
    "conversion": ("float(uint4(half4(1.5h, 2.5h, 3, 4)).y) + char4(char(-1)).x + uchar(257)", 2),
    "packed": ("sizeof(packed_float3) + sizeof(float3) + sizeof(half4) + alignof(float4)", 52),
    "limits": ("(numeric_limits<uint>::max() >> 31) + (Limits<float>::min == -INFINITY)", 2),
    "literals": ("0.5 + 0.25h + float(0.25bf) + 1e0f", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expression(bench: MetalBench, name: str) -> None:
    expression, value = EXPRESSIONS[name]
    kernel = KernelSource("expression", [], ["out"], f"out[0] = float({expression});")
    out = bench.run(kernel, inputs=[], **outputs((1,)), **linear(1))
    assert out[0].item() == value


def test_math_functions(bench: MetalBench) -> None:
    names = ["exp", "log", "sqrt", "sin", "cos", "tanh", "rsqrt", "exp2", "log2", "floor", "ceil"]
    calls = ", ".join(f"{space}{n}(x[i])" for n in names for space in ("", "fast::", "precise::"))
    body = f"uint i = thread_position_in_grid.x; float v[] = {{{calls}}};"
    body += f"for (int j = 0; j < {3 * len(names)}; j++) out[j * 50 + i] = v[j];"
    x = mx.linspace(0.1, 3, 50)
    kernel = KernelSource("math", ["x"], ["out"], body)
    out = bench.run(kernel, inputs=[x], **outputs((len(names), 3, 50)), **linear(50))[0]
    expected = mx.stack([mx.power(2.0, x) if n == "exp2" else getattr(mx, n)(x) for n in names])
    expected = expected[:, None]
    assert mx.allclose(out, mx.broadcast_to(expected, out.shape), rtol=1e-5, atol=1e-6)
