"""Known-good kernels whose threads work together: simdgroups, threadgroups, matrices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import mlx.core as mx
import pytest

from .bench import KernelSource, MetalBench
from .kernel_runs import RUNS, equal, every_run, linear, outputs

# ---- simdgroups ----------------------------------------------------------------------------------

LANES = list(range(1, 33))
SIMD_FUNCTIONS: dict[str, tuple[str, Callable[[int], float]]] = {
    "sum": ("simd_sum(v)", lambda i: sum(LANES)),
    "product": ("simd_product(lane < 3 ? v : 1)", lambda i: 6),
    "max": ("simd_max(v) - simd_min(v)", lambda i: 31),
    "bitwise": ("simd_or(u) * 100 + simd_and(u | 64) + simd_xor(u)", lambda i: 6300 + 64 + 32),
    "prefix-inclusive": ("simd_prefix_inclusive_sum(v)", lambda i: list(accumulate(LANES))[i]),
    "prefix-exclusive": ("simd_prefix_exclusive_sum(v)", lambda i: sum(LANES[:i])),
    "prefix-product": (
        "simd_prefix_inclusive_product(lane < 4 ? v : 1)", lambda i: (1, 2, 6, 24)[min(i, 3)]
    ),
    "shuffle": ("simd_shuffle(v, 31 - lane)", lambda i: 32 - i),
    "shuffle-xor": ("simd_shuffle_xor(v, 5)", lambda i: (i ^ 5) + 1),
    "shuffle-up": ("simd_shuffle_up(v, 3)", lambda i: LANES[i - 3 if i >= 3 else i]),
    "shuffle-down": ("simd_shuffle_down(v, 3)", lambda i: LANES[i + 3 if i < 29 else i]),
    "rotate": ("simd_shuffle_rotate_up(v, 1)", lambda i: LANES[i - 1]),
    "fill": ("simd_shuffle_and_fill_up(v, -v, 2)", lambda i: LANES[i - 2] * (1 if i > 1 else -1)),
    "broadcast": ("simd_broadcast(v, 9) + simd_broadcast_first(v)", lambda i: 11),
    "ballot": ("popcount((simd_vote::vote_t)simd_ballot(lane % 3 == 0))", lambda i: 11),
    "votes": ("simd_any(u == 3) + simd_all(u < 32) + simd_is_first()", lambda i: 1 + (i == 0)),
    "quad-sum": ("quad_sum(v)", lambda i: sum(LANES[i // 4 * 4 :][:4])),
    "quad-shuffle": (
        "quad_shuffle_xor(v, 1) + quad_broadcast(v, 2)", lambda i: (i ^ 1) + i // 4 * 4 + 4
    ),
    "vectors": ("simd_sum(float4(v, 1, 0, 0)).x + simd_shuffle(uint2(u, 7), 3).y", lambda i: 535),
    "half": ("float(simd_sum(half(v))) + simd_max(bfloat(v))", lambda i: 560),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMD_FUNCTIONS)
def test_simd_function(bench: MetalBench, name: str) -> None:
    expression, expected = SIMD_FUNCTIONS[name]
    body = f"""uint lane = thread_index_in_simdgroup, u = lane + 1; float v = u;
        out[thread_position_in_grid.x] = float({expression});"""
    kernel = KernelSource("simd", [], ["out"], body)
    for options in ({"mode": "fast"}, {"mode": "checked", "seed": 5}):
        out = bench.run(kernel, inputs=[], **outputs((64,)), **linear(64), **options)
        assert out[0].tolist() == [expected(i % 32) for i in range(64)]


def test_divergent_simd_function_uses_the_active_lanes(bench: MetalBench) -> None:
    body = """uint lane = thread_index_in_simdgroup; float v = 0;
        if (lane < 16) v = simd_sum(1.0f);
        else v = simd_sum(2.0f) + simd_min(float(lane));
        out[thread_position_in_grid.x] = v;"""
    kernel = KernelSource("divergent", [], ["out"], body)
    out = bench.run(kernel, inputs=[], **outputs((32,)), **linear(32), divergent_simd=True)
    assert out[0].tolist() == [16.0] * 16 + [48.0] * 16


# ---- threadgroups --------------------------------------------------------------------------------

ROW_SUM = KernelSource(
    "row_sum",
    ["x"],
    ["out"],
    """
    threadgroup float partial[32];
    uint row = threadgroup_position_in_grid.y, t = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    float sum = 0;
    for (uint i = t; i < N; i += threads_per_threadgroup.x) sum += float(x[row * N + i]);
    sum = simd_sum(sum);
    if (lane == 0) partial[simdgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0) {
      sum = simd_sum(lane < simdgroups_per_threadgroup ? partial[lane] : 0.0f);
      if (lane == 0) out[row] = T(sum);
    }
    """,
)


def run_row_sum(
    bench: MetalBench, kernel: KernelSource, rows: int = 3, size: int = 100, **options: Any
) -> None:
    x = (mx.arange(rows * size) % 7).reshape(rows, size)
    out = bench.run(
        kernel,
        inputs=[x.astype(mx.float32)],
        template=[("T", mx.float32), ("N", size)],
        grid=(128, rows, 1),
        threadgroup=(128, 1, 1),
        **outputs((rows,)),
        **options,
    )
    assert equal(out[0], x.sum(1).astype(mx.float32))


@every_run
def test_reduction_across_simdgroups(bench: MetalBench, options: dict[str, Any]) -> None:
    for size in (1, 31, 1000):
        run_row_sum(bench, ROW_SUM, size=size, **options)


TRANSPOSE = KernelSource(
    "transpose",
    ["x"],
    ["out"],
    """
    threadgroup T tile[16][16 + 1];
    uint2 g = threadgroup_position_in_grid.xy * 16, t = thread_position_in_threadgroup.xy;
    uint rows = x_shape[0], columns = x_shape[1];
    for (uint j = t.y; j < 16; j += 8)
      if (g.y + j < rows && g.x + t.x < columns) tile[j][t.x] = x[(g.y + j) * columns + g.x + t.x];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint j = t.y; j < 16; j += 8)
      if (g.x + j < columns && g.y + t.x < rows) out[(g.x + j) * rows + g.y + t.x] = tile[t.x][j];
    """,
)


@every_run
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.uint8], ids=str)
def test_tiled_transpose(bench: MetalBench, dtype: mx.Dtype, options: dict[str, Any]) -> None:
    for rows, columns in ((16, 16), (33, 18)):
        x = mx.arange(rows * columns).astype(dtype).reshape(rows, columns)
        grid = (-(-columns // 16) * 16, -(-rows // 16) * 8, 1)
        shape: dict[str, Any] = {
            "grid": grid,
            "threadgroup": (16, 8, 1),
            "template": [("T", dtype)],
        }
        out = bench.run(
            TRANSPOSE, inputs=[x], **shape, **outputs((columns, rows), dtype=dtype), **options
        )
        assert equal(out[0], x.T)


@every_run
def test_prefix_sum_of_a_threadgroup(bench: MetalBench, options: dict[str, Any]) -> None:
    body = """
        threadgroup int sums[256];
        uint t = thread_position_in_threadgroup.x, i = thread_position_in_grid.x;
        int value = x[i];
        sums[t] = value;
        for (uint apart = 1; apart < 256; apart *= 2) {
          threadgroup_barrier(mem_flags::mem_threadgroup);
          int other = t >= apart ? sums[t - apart] : 0;
          threadgroup_barrier(mem_flags::mem_threadgroup);
          sums[t] += other;
        }
        out[i] = sums[t];"""
    kernel = KernelSource("prefix", ["x"], ["out"], body)
    x = mx.arange(512) % 11
    out = bench.run(
        kernel, inputs=[x], **outputs((512,), dtype=mx.int32), **linear(512, 256), **options
    )
    assert equal(out[0], mx.cumsum(x.reshape(2, 256), axis=1).reshape(-1))


@every_run
def test_simdgroup_barriers_order_a_simdgroup(bench: MetalBench, options: dict[str, Any]) -> None:
    body = """
        threadgroup int all[64];
        threadgroup int* mine = all + 32 * simdgroup_index_in_threadgroup;
        uint lane = thread_index_in_simdgroup;
        int v = thread_position_in_grid.x;
        for (int k = 0; k < 3; k++) {
          mine[lane] = v;
          simdgroup_barrier(mem_flags::mem_threadgroup);
          v = mine[(lane + 1) % 32] + mine[0] - mine[0];
          simdgroup_barrier(mem_flags::mem_threadgroup);
        }
        out[thread_position_in_grid.x] = v;"""
    kernel = KernelSource("rotate", [], ["out"], body)
    out = bench.run(kernel, inputs=[], **outputs((64,), dtype=mx.int32), **linear(64), **options)
    expected = [32 * (i // 32) + (i + 3) % 32 for i in range(64)]
    assert out[0].tolist() == expected and out.threadgroup_bytes == 256


@every_run
def test_threads_that_exit_early_do_not_disturb_simd_functions(
    bench: MetalBench, options: dict[str, Any]
) -> None:
    body = "uint i = thread_position_in_grid.x; if (i >= N) return; out[i] = simd_sum(1.0f);"
    kernel = KernelSource("early", [], ["out"], body)
    call: dict[str, Any] = {"inputs": [], "template": [("N", 40)]}
    out = bench.run(kernel, **call, **outputs((40,)), **linear(64), **options)
    assert out[0].tolist() == [32.0] * 32 + [8.0] * 8


def test_bytes_of_wider_elements_do_not_race(bench: MetalBench) -> None:
    body = """
        threadgroup uint b[16];
        uint t = thread_position_in_threadgroup.x;
        ((threadgroup uchar*)b)[t] = t;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        ((device ushort*)out)[t] = ((threadgroup uchar*)b)[63 - t];"""
    kernel = KernelSource("bytes", [], ["out"], body)
    for options in RUNS:
        out = bench.run(
            kernel, inputs=[], **outputs((32,), dtype=mx.uint32), **linear(64), **options
        )
        assert out[0].view(mx.uint16).tolist() == list(range(63, -1, -1))


def test_messages_through_device_memory(bench: MetalBench) -> None:
    body = """uint i = thread_position_in_grid.x; out[i] = i;
        threadgroup_barrier(mem_flags::mem_device);
        float other = out[i ^ 33];
        threadgroup_barrier(mem_flags::mem_device);
        out[i] = other;"""
    kernel = KernelSource("device", [], ["out"], body)
    for options in RUNS:
        out = bench.run(kernel, inputs=[], **outputs((64,)), **linear(64), **options)
        assert out[0].tolist() == [float(i ^ 33) for i in range(64)]


MATMUL = KernelSource(
    "matmul",
    ["a", "b"],
    ["out"],
    """
    uint2 g = threadgroup_position_in_grid.xy * 16;
    uint simdgroup = simdgroup_index_in_threadgroup;
    uint row = g.y + 8 * (simdgroup / 2), column = g.x + 8 * (simdgroup % 2);
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 0; k < K; k += 8) {
      simdgroup_matrix<T, 8, 8> left, right;
      simdgroup_load(left, a + row * K + k, K);
      simdgroup_load(right, b + column * K + k, K, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(sum, left, right, sum);
    }
    sum.thread_elements() *= 2.0f;
    simdgroup_store(sum, out + row * N + column, N);
    """,
)


@every_run
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_simdgroup_matrices(bench: MetalBench, dtype: mx.Dtype, options: dict[str, Any]) -> None:
    a, b = mx.random.normal((2, 32, 24), key=mx.random.key(1)).astype(dtype)
    out = bench.run(
        MATMUL,
        inputs=[a, b],
        template=[("T", dtype), ("N", 32), ("K", 24)],
        grid=(256, 2, 1),
        threadgroup=(128, 1, 1),
        **outputs((32, 32)),
        **options,
    )
    expected = 2 * a.astype(mx.float32) @ b.astype(mx.float32).T
    assert mx.allclose(out[0], expected, rtol=1e-4, atol=1e-4)
