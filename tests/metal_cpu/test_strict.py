"""The strict pass: refuses what Metal's compiler refuses, and nothing else."""

from __future__ import annotations

import mlx.core as mx
import pytest

from .bench import KernelSource, MetalBench
from .errors import KernelRejected

HEADER = """
struct Pair { float a, b; float sum() { return a + b; } };
struct Named { float first; Named(const thread float* p) : first(p[0]) {} };
constant float table[2] = {1.0f, 2.0f};
inline float of_thread(const thread float* p) { return p[0]; }
inline float of_device(const device float* p) { return p[0]; }
inline float of_constant(constant float* p) { return p[0]; }
inline float of_threadgroup(threadgroup float* p) { return p[0]; }
inline threadgroup void* out_of_nowhere() { return nullptr; }
inline float of_array(threadgroup float p[32]) { return p[0]; }
template <class P> float of_any(P p) { return p[0]; }
template <typename T, int N> struct Tile {
  static float first(const threadgroup T* p, uint lane) { return float(p[lane * N]); }
};
"""

REFUSED = {
    "device-to-unqualified": "const float* p = x; out[i] = p[0];",
    "device-to-thread-parameter": "out[i] = of_thread(x);",
    "device-to-threadgroup": "threadgroup const float* p = x; out[i] = p[0];",
    "device-to-constant-parameter": "out[i] = of_constant(x);",
    "constant-to-device": "const device float* p = c; out[i] = p[0];",
    "constant-to-device-parameter": "out[i] = of_device(c);",
    "threadgroup-to-device": "threadgroup float b[32]; const device float* p = b; out[i] = p[0];",
    "threadgroup-to-unqualified": "threadgroup float b[32]; float* p = b; out[i] = p[0];",
    "local-to-device": "float v = 1; const device float* p = &v; out[i] = p[0];",
    "structure-from-a-wrong-pointer": "Named s(x); out[i] = s.first;",
    "reference-to-device": "float& r = out[i]; r = 1;",
    "cast-drops-the-space": "const float* p = (const float*)x; out[i] = p[0];",
    "reinterpret-cast-drops-the-space": "auto p = reinterpret_cast<float4*>(x); out[i] = p->x;",
    "write-to-an-input": "x[i] = 1; out[i] = 0;",
    "write-to-a-table": "table[0] = 1; out[i] = 0;",
    "const-cast-away-by-pointer": "device float* p = x; p[i] = 1; out[i] = 0;",
    "double": "double d = x[i]; out[i] = d;",
    "long-double-literal": "out[i] = x[i] * 2.0L;",
    "ambiguous-max": "out[i] = max(x[i], 0);",
    "ambiguous-min-of-signs": "out[i] = min(i, 3);",
    "undeclared": "out[i] = no_such_function(x[i]);",
    "standard-library": "out[i] = std::exp(x[i]);",
    "float-to-bfloat": "bfloat b = x[i]; out[i] = b;",
    "bfloat-to-half": "bfloat b = bfloat(x[i]); half h = b; out[i] = h;",
    "float-to-bfloat-return": "T t = x[i] * 2.0f; out[i] = float(t);",
    "threadgroup-with-a-value": "threadgroup float b = 0; out[i] = b;",
    "vectors-of-different-types": "out[i] = (float4(1) * half4(1)).x;",
    "matrix-from-a-wrong-space": "simdgroup_float8x8 m; simdgroup_load(m, c, 8); out[i] = 0;",
    "atomic-in-thread-memory": """atomic_uint n; out[i] =
        atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);""",
}

ACCEPTED = {
    "device-pointer": "const device float* p = x + 1; out[i] = p[0];",
    "device-reference": "device float& r = out[i]; r = x[i];",
    "auto-pointer": "auto p = x + i; out[i] = *p;",
    "constant-pointer": "constant float* p = table; out[i] = p[0] + of_constant(table);",
    "cast-to-vectors": "auto p = (const device float4*)x; float4 v = p[i]; out[i] = v.x + v.w;",
    "reinterpret-cast": "auto p = reinterpret_cast<const device float4*>(x); out[i] = p[0].y;",
    "cast-to-integer": "out[i] = (float)(int)x[i] + float(*(const device uint*)(x + i));",
    "thread-array": "float v[4] = {0}; thread float* p = v; p[1] = x[i]; out[i] = of_thread(v);",
    "helpers": "threadgroup float b[2]; out[i] = of_device(x) + of_constant(c) + of_any(b);",
    "template-of-any-space": "threadgroup float b[32]; b[0] = 1; out[i] = of_any(b) + of_any(x);",
    "array-parameter": "threadgroup float b[2]; out[i] = of_array(b) + of_threadgroup(b);",
    "class-template": "threadgroup T b[64]; b[i] = T(x[i]); out[i] = Tile<T, 2>::first(b, 3);",
    "structure": "Pair s = {1, 2}; out[i] = s.sum() + s.a;",
    "structures-are-copied": """threadgroup Pair b[4]; Pair s = ((const device Pair*)x)[i];
        b[i % 4] = s; Pair r = b[0]; out[i] = r.a;""",
    "structure-in-threadgroup-memory": "threadgroup Pair b[4]; b[0].a = x[i]; out[i] = b[0].a;",
    "swizzles": "float4 v(1, 2, 3, 4); float2 w = v.zw; v.xy = w; out[i] = dot(v, float4(1.0f));",
    "vector-constructors": """float3 a(1.0f, 2.0f, 3.0f); auto b = vec<float, 4>(a, 1.0f);
        float4 d = float4(a.xy, float2(0)); uint2 e = uint2(i, 1u); out[i] = b.w + d.x + e.y;""",
    "vector-conversions": """half4 h = half4(*(const device float4*)x);
        float4 f = float4(h) * scale; auto p = *(const device packed_float3*)(x + i);
        threadgroup float4 (&r)[2] = *(threadgroup float4 (*)[2])out_of_nowhere();
        out[i] = f.x + float3(p).x + r[1].x;""",
    "vector-alias": "using V = vec<T, 4>; V v = V(T(1), T(2), T(3), T(4)); out[i] = float(v.x);",
    "vector-function": "auto f = float4(x[i], 0, 0, 1); out[i] = max(f, f).x + clamp(f, 0, 1).y;",
    "scalar-constants": "const float k = scale * 2; out[i] = x[i] * k + scale;",
    "literals": "out[i] = x[i] * 0.5 + 1e-3 + float(0.5h) + -1e30;",
    "half-from-float": "half h = x[i]; h = h * 2.0f; out[i] = h;",
    "bfloat-with-cast": "bfloat b = bfloat(x[i]); b = static_cast<bfloat>(b * 2.0f); out[i] = b;",
    "conditional-of-half-and-float": "half h = 1; out[i] = i > 3 ? h : 0.0;",
    "several-variables": "threadgroup float a[4], b[2][8]; a[i % 4] = b[1][i % 8] = 0; out[i] = 0;",
    "barriers": """threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
        simdgroup_barrier(mem_flags::mem_none); out[i] = 0;""",
    "mlx-utilities": "out[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)] + Limits<float>::max;",
    "votes": "auto v = (simd_vote::vote_t)simd_ballot(i > 3); out[i] = popcount(v) + simd_any(i);",
    "atomics": """threadgroup atomic_uint n; atomic_store_explicit(&n, 0u, memory_order_relaxed);
        out[i] = atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);""",
    "matrix": """threadgroup float b[64]; simdgroup_float8x8 m; simdgroup_load(m, x, 8);
        simdgroup_multiply_accumulate(m, m, m, m); simdgroup_store(m, b, 8);
        out[i] = m.thread_elements()[0];""",
    "unrolled-loop": """
        #pragma clang loop unroll(full)
        for (int j = 0; j < 4; j++) { out[i] = x[j]; }
        """,
    "comment-about-threadgroup": "// threadgroup float b[4];\nout[i] = 0; /* (float*)x */",
}


def compile_strictly(bench: MetalBench, body: str) -> None:
    body = "uint i = thread_position_in_grid.x;\n" + body
    kernel = KernelSource("strict", ["x", "c", "scale"], ["out"], body, HEADER).build()
    inputs = [mx.zeros((64,)), mx.zeros((4,)), mx.array(1.0)]
    bench.check_syntax(
        kernel,
        inputs=inputs,
        template=[("T", mx.bfloat16)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )


@pytest.fixture
def strict_bench(bench: MetalBench) -> MetalBench:
    if not bench.strict:
        pytest.skip(
            f"{bench.compiler} has no address spaces: needs clang++ or `pip install ziglang`"
        )
    return bench


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(strict_bench: MetalBench, name: str) -> None:
    with pytest.raises(KernelRejected, match="strict: "):
        compile_strictly(strict_bench, REFUSED[name])


def test_refuses_threadgroup_variables_of_functions(strict_bench: MetalBench) -> None:
    header = "inline float f() { threadgroup float b[4]; return b[0]; }\n"
    kernel = KernelSource("strict", [], ["out"], "out[0] = f();", header)
    with pytest.raises(KernelRejected, match="only a kernel may declare .*: b"):
        strict_bench.run(
            kernel,
            inputs=[],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
        )


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(strict_bench: MetalBench, name: str) -> None:
    compile_strictly(strict_bench, ACCEPTED[name])
