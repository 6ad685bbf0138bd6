"""Kernels that other people wrote and ship: MLX's attention, and mlx-lm's.

They show that the bench understands Metal as it is written, raises no false alarm, and finds what
is there: mlx-lm's KL divergence lacks barriers.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from .bench import KernelSource, MetalBench
from .errors import KernelFault
from .mutate import Mutation, assert_caught, without_barrier
from .toolchain import MLX_INCLUDE

RUNS: list[dict[str, Any]] = [
    {"mode": "fast"},
    {"mode": "checked"},
    {"mode": "checked", "seed": 3},
]
every_run = pytest.mark.parametrize(
    "options", RUNS, ids=lambda o: f"{o['mode']}-seed{o.get('seed', 0)}"
)
every_type = pytest.mark.parametrize(
    "dtype,tolerance", [(mx.float32, 5e-6), (mx.float16, 3e-3), (mx.bfloat16, 2e-2)], ids=str
)


def assert_close(actual: mx.array, expected: mx.array, tolerance: float) -> None:
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    error = mx.abs(actual - expected).max() / mx.abs(expected).max()
    assert float(error) < tolerance


# ---- MLX -----------------------------------------------------------------------------------------


def sdpa_vector() -> KernelSource:
    """MLX's attention for one query, out of the header that its wheel ships."""
    text = (MLX_INCLUDE / "mlx/backend/metal/kernels/sdpa_vector.h").read_text()
    start = text.index(") {\n", text.index("void sdpa_vector(")) + 4
    body = text[start : text.index("\n}\n", start)]
    function_constants = """
        constexpr bool has_mask = false, query_transposed = false, bool_mask = false;
        constexpr bool float_mask = false, has_sinks = false, do_causal = Causal;
        constexpr int V = D;
        const device bool* bmask = nullptr;
        const device T *fmask = nullptr, *sinks = nullptr;
        int num_q_heads = 1, mask_kv_seq_stride = 0, mask_q_seq_stride = 0, mask_head_stride = 0;
        uint3 tid = threadgroup_position_in_grid, tpg = threadgroups_per_grid;
        uint simd_gid = simdgroup_index_in_threadgroup, simd_lid = thread_index_in_simdgroup;
    """
    strides = ["k_head_stride", "k_seq_stride", "v_head_stride", "v_seq_stride"]
    inputs = ["queries", "keys", "values", "gqa_factor", "N", *strides, "scale"]
    return KernelSource("sdpa_vector", inputs, ["out"], function_constants + body)


def check_sdpa_vector(
    bench: MetalBench,
    kernel: KernelSource,
    dtype: mx.Dtype = mx.float32,
    tolerance: float = 5e-6,
    keys: int = 77,
    queries: int = 1,
    **options: Any,
) -> None:
    heads, kv_heads, dim = 4, 2, 64
    random = iter(mx.random.split(mx.random.key(0), 3))
    q = mx.random.normal((1, heads, queries, dim), key=next(random)).astype(dtype)
    k = mx.random.normal((1, kv_heads, keys, dim), key=next(random)).astype(dtype)
    v = mx.random.normal((1, kv_heads, keys, dim), key=next(random)).astype(dtype)
    strides = [mx.array(n, mx.uint64) for n in (keys * dim, dim, keys * dim, dim)]
    out = bench.run(
        kernel,
        inputs=[q, k, v, mx.array(heads // kv_heads), mx.array(keys), *strides, dim**-0.5],
        template=[("T", dtype), ("D", dim), ("Causal", queries > 1)],
        grid=(heads * 1024, queries, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[dtype],
        **options,
    )[0]
    mask = "causal" if queries > 1 else None
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, mask=mask)
    assert_close(out, expected, tolerance)


@every_run
@every_type
def test_mlx_sdpa_vector(
    bench: MetalBench, dtype: mx.Dtype, tolerance: float, options: dict[str, Any]
) -> None:
    check_sdpa_vector(bench, sdpa_vector(), dtype, tolerance, **options)


def test_mlx_sdpa_vector_causal(bench: MetalBench) -> None:
    for placement in ("end", "unaligned"):
        check_sdpa_vector(bench, sdpa_vector(), keys=200, queries=3, placement=placement)


@pytest.mark.parametrize(
    "mutation",
    [
        without_barrier(1),
        without_barrier(2),
        without_barrier(3),
        Mutation("wrong-flags", "mem_flags::mem_threadgroup", "mem_flags::mem_device"),
        Mutation("too-many-keys", "i < N;", "i <= N;"),
        Mutation("wrong-stride", "BN * int(k_seq_stride)", "(BN + 1) * int(k_seq_stride)"),
        Mutation("wrong-head", "/ gqa_factor", "/ (gqa_factor / 2)"),
        Mutation("no-rescaling", "o[j] * factor +", "o[j] +"),
        Mutation("no-simd-sum", "score = simd_sum(score);", ""),
        Mutation(
            "transposed",
            "outputs[simd_gid * BD + simd_lid] * factor",
            "outputs[simd_lid * BD + simd_gid] * factor",
        ),
        Mutation("early-return", "if (simd_lid == 0) {", "if (simd_gid > 15) return; if (true) {"),
        Mutation("lanes-for-simdgroups", "for (int i = simd_gid;", "for (int i = simd_lid;"),
    ],
    ids=str,
)  # fmt: skip
def test_mutated_sdpa_vector_is_caught(bench: MetalBench, mutation: Mutation) -> None:
    assert_caught(
        sdpa_vector(), mutation, lambda kernel: check_sdpa_vector(bench, kernel, mode="checked")
    )


# ---- mlx-lm --------------------------------------------------------------------------------------


def load_on_bench(bench: MetalBench, name: str, **options: Any) -> ModuleType:
    """A private copy of a module of mlx-lm, whose kernels run on the bench."""
    pytest.importorskip("mlx_lm")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"this mlx-lm has no {name}")
    copy = importlib.util.spec_from_file_location(f"{name}_on_bench", spec.origin)
    assert copy is not None and copy.loader is not None
    module = importlib.util.module_from_spec(copy)
    sys.modules[copy.name] = module  # for the module's own decorators
    with bench.patched(**options):
        copy.loader.exec_module(module)
    return module


@every_run
@every_type
@pytest.mark.parametrize("invert", [False, True], ids=["scale", "inverse-scale"])
def test_mlx_lm_bitlinear(
    bench: MetalBench, invert: bool, dtype: mx.Dtype, tolerance: float, options: dict[str, Any]
) -> None:
    module = load_on_bench(bench, "mlx_lm.models.bitlinear_layers", **options)
    inputs, outputs = 256, 64
    layer = module.BitLinear(inputs, outputs, bias=False, invert_weight_scales=invert)
    weights = mx.random.randint(0, 3, (4, outputs // 4, inputs), key=mx.random.key(0))
    shifts = mx.array([1, 4, 16, 64]).reshape(4, 1, 1)
    layer.weight = (weights * shifts).sum(0).astype(mx.uint8)
    layer.weight_scale = mx.array([1.75], dtype)
    x = mx.random.normal((3, inputs), key=mx.random.key(1)).astype(dtype)
    expected = x.astype(mx.float32) @ (weights.reshape(outputs, inputs) - 1).astype(mx.float32).T
    assert_close(layer(x), expected * (1 / 1.75 if invert else 1.75), tolerance)


@every_run
@pytest.mark.parametrize("kind", ["scalar-gate", "vector-gate", "unpacked"])
def test_mlx_lm_gated_delta(bench: MetalBench, kind: str, options: dict[str, Any]) -> None:
    module = load_on_bench(bench, "mlx_lm.models.gated_delta", **options)
    random = iter(mx.random.split(mx.random.key(0), 6))
    batch, steps, key_heads, value_heads, key_dim, value_dim = 1, 5, 2, 4, 128, 8
    q = mx.random.normal((batch, steps, key_heads, key_dim), key=next(random)) * 0.1
    k = mx.random.normal((batch, steps, key_heads, key_dim), key=next(random)) * 0.1
    v = mx.random.normal((batch, steps, value_heads, value_dim), key=next(random))
    gate_shape = (batch, steps, value_heads) + ((key_dim,) if kind == "vector-gate" else ())
    gate = mx.random.uniform(shape=gate_shape, key=next(random))
    beta = mx.random.uniform(shape=(batch, steps, value_heads), key=next(random))
    state = mx.random.normal((batch, value_heads, value_dim, key_dim), key=next(random))
    function = getattr(module, f"gated_delta_kernel{'_unpacked' * (kind == 'unpacked')}", None)
    if function is None:
        pytest.skip("this mlx-lm has no such kernel")
    out, new_state = function(q, k, v, gate, beta, state)
    expected, expected_state = module.gated_delta_ops(q, k, v, gate, beta, state)
    assert_close(out, expected, 1e-5)
    assert_close(new_state, expected_state, 1e-5)


@every_run
def test_mlx_lm_expert_routing(bench: MetalBench, options: dict[str, Any]) -> None:
    module = load_on_bench(bench, "mlx_lm.kernels.expert_routing", **options)
    x = mx.random.normal((5, 100), key=mx.random.key(0))
    bias = mx.random.normal((100,), key=mx.random.key(1)) * 0.1
    indices, weights = module.expert_routing(
        x, bias, top_k=4, multiplier=1.5, score_eps=1e-9, route_scale=2.0
    )
    scores = mx.sigmoid(x * 1.5)
    expected = mx.argsort(-(scores + bias), axis=-1)[:, :4]
    chosen = mx.take_along_axis(scores, expected, -1)
    assert mx.array_equal(indices, expected.astype(indices.dtype))
    assert_close(weights, chosen / (chosen.sum(-1, keepdims=True) + 1e-9) * 2, 5e-6)


@every_run
@every_type
def test_mlx_lm_qk_norm_rope(
    bench: MetalBench, dtype: mx.Dtype, tolerance: float, options: dict[str, Any]
) -> None:
    module = load_on_bench(bench, "mlx_lm.kernels.qk_norm_rope", **options)
    heads, kv_heads, dim = 4, 2, 64
    x = mx.random.normal((1, 3, 2 * (heads + kv_heads) * dim), key=mx.random.key(0)).astype(dtype)
    settings = {"n_heads": heads, "n_kv_heads": kv_heads, "head_dim": dim, "eps": 1e-5}
    rope = {"rope_base": 10000.0, "offset": 7}
    q, _ = module.qk_norm_rope(x, query_scale=0.5, **settings, **rope)
    expected = x[..., : heads * dim].reshape(1, 3, heads, dim)
    expected = mx.fast.rms_norm(expected, None, 1e-5).swapaxes(1, 2) * 0.5
    expected = mx.fast.rope(expected, dim, traditional=True, base=1e4, scale=1.0, offset=7)
    assert_close(q, expected.swapaxes(1, 2), tolerance)


@every_run
@every_type
def test_mlx_lm_norm_add_norm(
    bench: MetalBench, dtype: mx.Dtype, tolerance: float, options: dict[str, Any]
) -> None:
    module = load_on_bench(bench, "mlx_lm.kernels.norm_add_norm", **options)
    random = iter(mx.random.split(mx.random.key(0), 5))
    branch = mx.random.normal((2, 1000), key=next(random)).astype(dtype)
    stream = mx.random.normal((2, 1000), key=next(random))
    alpha, beta = mx.random.normal((2, 1000), key=next(random))
    weight = mx.random.normal((1000,), key=next(random)).astype(dtype)
    norm = nn.RMSNorm(1000, 1e-6)
    new_stream, normed = module.norm_add_norm(
        branch, stream, alpha=alpha, beta=beta, post_weight=weight, post_eps=1e-5, next_norm=norm
    )
    post = mx.fast.rms_norm(branch * weight, None, 1e-5).astype(mx.float32)
    expected = alpha * stream + beta * post
    assert_close(new_stream, expected, tolerance)
    assert_close(normed, mx.fast.rms_norm(expected, norm.weight, 1e-6), tolerance)


# ---- a missing barrier that was shipped ----------------------------------------------------------

KL_DIGEST = "5e9b73782109d4776cc96ad0348cf6407c190ec9de49f261aa4674b039d80428"


def kl_kernel(bench: MetalBench) -> KernelSource:
    """mlx-lm's KL divergence, as it was when these tests were written."""
    losses = load_on_bench(bench, "mlx_lm.tuner.losses")
    with bench.patched():
        kernel = KernelSource.of(losses._make_kl_forward_kernel)
    if hashlib.sha256(kernel.source.encode()).hexdigest() != KL_DIGEST:
        pytest.skip("mlx-lm's KL kernel has changed since")
    return kernel


def run_kl(bench: MetalBench, kernel: KernelSource, **options: Any) -> tuple[mx.array, mx.array]:
    size = 5000
    q, p = mx.random.normal((2, 2, size), key=mx.random.key(0))
    out = bench.run(
        kernel,
        inputs=[q, p],
        template=[("T", mx.float32), ("V", size)],
        grid=(1024, 2, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(2,)],
        output_dtypes=[mx.float32],
        **options,
    )
    log_q, log_p = (x - mx.logsumexp(x, -1, keepdims=True) for x in (q, p))
    return out[0], nn.losses.kl_div_loss(log_q, log_p, axis=-1, reduction="none")


def test_finds_the_missing_barrier_in_mlx_lm(bench: MetalBench) -> None:
    with pytest.raises(KernelFault) as caught:
        run_kl(bench, kl_kernel(bench), mode="checked")
    races = [d for d in caught.value.diagnoses if d.startswith("data race")]
    # One simdgroup stores its sum where another still has to read the maximum.
    assert any("= max_q;`" in d or "= sum_exp_q;`" in d for d in races)


@every_run
def test_repaired_kl_is_clean_and_right(bench: MetalBench, options: dict[str, Any]) -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    add_barrier = Mutation(
        "", "max_p = simd_max(max_p);\n\n", f"max_p = simd_max(max_p); {barrier}\n\n"
    )
    fence = Mutation("", "mem_flags::mem_none", "mem_flags::mem_threadgroup", occurrence=0)
    kernel = kl_kernel(bench).edited(add_barrier).edited(fence)
    actual, expected = run_kl(bench, kernel, **options)
    assert_close(actual, expected, 1e-4)
