"""The kernel ternary_matvec on the bench: values, bytes, and mistakes that must be noticed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_delta import load
from mlx_delta.ops import proving
from mlx_delta.ops import ternary_matvec as ternary_kernel
from mlx_delta.ternary import codes as ternary
from mlx_delta.ternary.linear import TernaryLinear
from tests.gpus import Everything
from tests.metal_cpu.bench import KernelSource, MetalBench
from tests.metal_cpu.fixture import bench
from tests.metal_cpu.mutate import Mutation, assert_caught, without_barrier
from tests.ternary.test_bitnet import GOLDEN, checkpoints, write

__all__ = ["bench"]

SOURCE = KernelSource.of(ternary_kernel.matvec_kernel.__wrapped__)
SCALE = 0.0625
TOLERANCE = {mx.float32: 1e-6, mx.bfloat16: 8e-3, mx.float16: 1e-3}
CHECKED: list[dict[str, Any]] = [{"mode": "checked", "seed": seed} for seed in range(3)]


def problem(rows: int, inputs: int, outputs: int, dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """Activations, of which some are zeros, and codes."""
    rng = np.random.default_rng(inputs + outputs + rows)
    x = mx.array(rng.normal(size=(rows, inputs)).astype(np.float32) * 3).astype(dtype)
    return x, rng.integers(0, 3, (outputs, inputs)).astype(np.uint8)


def expected(x: mx.array, codes: np.ndarray, quantize: bool) -> np.ndarray:
    """The product in float64, the rounding of activations in float32."""
    values = np.array(x.astype(mx.float32))
    steps = np.ones((len(values), 1))
    if quantize:
        scale = np.float32(127) / np.maximum(np.abs(values).max(-1, keepdims=True), 1e-5)
        values, steps = np.clip(np.round(values * scale), -128, 127), 1 / scale.astype(np.float64)
    return values.astype(np.float64) @ (codes.astype(np.float64) - 1).T * steps * SCALE


def check(
    bench: MetalBench,
    kernel: KernelSource = SOURCE,
    rows: int = 1,
    inputs: int = 96,
    outputs: int = 36,
    dtype: mx.Dtype = mx.float32,
    quantize: bool = True,
    x: mx.array | None = None,
    **options: Any,
) -> Any:
    """Run a kernel as the launcher does and compare its values."""
    made, codes = problem(rows, inputs, outputs, dtype)
    x = made if x is None else x
    scales = mx.full((outputs, inputs // 32), SCALE, dtype)
    calls: list[Any] = []

    def run(**call: Any) -> Any:
        calls.append(bench.run(kernel, **call, **options))
        return calls[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary_kernel, "matvec_kernel", lambda: run)
        words = ternary.pack_words(mx.array(codes))
        out = ternary_kernel.ternary_matvec(x, words, scales, quantize)
    wanted = expected(x, codes, quantize)
    assert out.dtype == dtype and out.shape == wanted.shape
    error = np.abs(np.array(out.astype(mx.float32)) - wanted).max()
    assert error <= TOLERANCE[dtype] * max(np.abs(wanted).max(), 1e-9)
    return calls[0]


@pytest.mark.parametrize(
    ("rows", "dtype", "quantize"),
    [
        (1, mx.float32, True),
        (4, mx.bfloat16, True),
        (3, mx.float32, True),
        (2, mx.float16, False),
        (1, mx.bfloat16, False),
    ],
    ids=str,
)
def test_values(bench, rows, dtype, quantize):
    """Sizes that leave lanes, words or simdgroups over, and BitNet's own."""
    for inputs, outputs in [(32, 4), (64, 32), (512, 28), (544, 132), (2560, 64), (6912, 36)]:
        for placement in ("end", "unaligned"):
            check(bench, SOURCE, rows, inputs, outputs, dtype, quantize, placement=placement)


@pytest.mark.parametrize("options", CHECKED, ids=lambda o: f"seed{o['seed']}")
@pytest.mark.parametrize("rows", [1, 4])
def test_no_undefined_behaviour(bench, rows, options):
    check(bench, rows=rows, dtype=mx.bfloat16, **options)


def test_rows_of_zeros_stay_zeros(bench):
    check(bench, x=mx.zeros((3, 96)), rows=3)


def test_ties_are_rounded_to_even(bench):
    x = mx.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] + [0.25] * 24])
    check(bench, x=x, inputs=32, outputs=8)


def test_quantized_sums_are_exact(bench):
    """The largest sums there can be: equal integers, so not one of them may be rounded."""
    inputs = 16384
    words, scales = mx.full((4, inputs // 16), 0xAAAAAAAA, mx.uint32), mx.ones((4, inputs // 128))
    with bench.patched():
        ternary_kernel.matvec_kernel.cache_clear()
        out = ternary_kernel.ternary_matvec(mx.full((1, inputs), 5.0), words, scales, True)
    ternary_kernel.matvec_kernel.cache_clear()
    step = 1 / (np.float32(127) / np.float32(5))
    np.testing.assert_allclose(out, np.full((1, 4), 127 * inputs * step), rtol=2e-7)


@pytest.mark.parametrize("rows", [1, 4])
def test_bytes(bench, rows):
    """Two bits a weight and one scale, whatever the number of rows."""
    if bench.on_gpu:
        pytest.skip("a GPU counts no bytes")
    inputs, outputs = 512, 64
    traffic = check(
        bench, rows=rows, inputs=inputs, outputs=outputs, dtype=mx.bfloat16, mode="checked"
    ).traffic
    assert traffic["weight"].loaded == inputs * outputs // 4
    assert traffic["scales"].loaded_distinct == 2
    assert traffic["x"].loaded_distinct == rows * inputs * 2
    assert traffic["out"].stored == rows * outputs * 2


MUTATIONS = [
    without_barrier(1),
    Mutation("one simdgroup's maximum", "i < Simdgroups; ++i", "i < 1; ++i"),
    Mutation("largest of signed values", "abs(float(x[r * inputs + i]))", "x[r * inputs + i]"),
    Mutation("no rounding", "rint(value * scale)", "value * scale"),
    Mutation("no guard", "if (first >= outputs) {", "if (false) {"),
    Mutation("guard before the barrier", "if (Quantize) {\n    for", "if (threadgroup_index > 0 && "
             "simdgroup > 0) return;\n  if (Quantize) {\n    for"),
    Mutation("words of one lane", "w += 32", "w += 64"),
    Mutation("codes are the weights", "simd_sum(dots[r][o]) - sum", "simd_sum(dots[r][o])"),
    Mutation("another row's activations", "x + r * inputs + w * 16", "x + w * 16"),
    Mutation("outputs interleaved", "rows[o * n_words + w]", "rows[w * 4 + o]"),
    Mutation("a row's maximum for all", "largest[r * Simdgroups + i]", "largest[i]"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations_are_caught(bench, mutation):
    if bench.on_gpu:
        pytest.skip("mistakes are not run on a GPU")
    x = mx.array(np.random.default_rng(0).normal(size=(2, 544)).astype(np.float32))
    x = x * mx.array([[1.0], [3.0]]) - 2 * mx.abs(x)  # rows differ, large values are negative
    assert_caught(
        SOURCE,
        mutation,
        lambda kernel: check(bench, kernel, rows=2, inputs=544, x=x, mode="checked", seed=1),
    )


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_layer_agrees_with_its_affine_path(bench, dtype, activation_bits):
    """With Metal a few rows take the kernel, more take MLX's product: of the same layer."""
    layer = TernaryLinear(96, 36, bias=True, activation_bits=activation_bits)
    x, codes = problem(12, 96, 36, dtype)
    layer.weight = ternary.pack_words(mx.array(codes))
    layer.scales, layer.biases = layer.scales * SCALE, layer.biases * SCALE
    layer.bias = mx.arange(36) / 36
    layer.set_dtype(dtype)
    layer.eval()
    ternary_kernel.matvec_kernel.cache_clear()
    with bench.patched(mode="checked"):
        affine = layer(x.reshape(3, 4, 96))
        kernel = mx.stack([layer(part) for part in x.reshape(3, 4, 96)])
        layer.one_scale = False
        assert mx.array_equal(layer(x[:1]), affine[0, :1])
    ternary_kernel.matvec_kernel.cache_clear()
    assert affine.dtype == kernel.dtype == dtype
    # Without a GPU MLX's product sums in bfloat16.
    tolerance = 5e-6 if dtype == mx.float32 else 0.1
    np.testing.assert_allclose(
        affine.astype(mx.float32), kernel.astype(mx.float32), rtol=tolerance, atol=tolerance
    )


def test_decode_through_the_kernel_gives_the_logits_of_transformers(bench, tmp_path):
    config = checkpoints.CASES["packed"]
    model, _ = load(write(tmp_path / "model"), None)
    ids, expected = mx.array(checkpoints.tokens()), GOLDEN["packed/logits"]
    calls = []
    ternary_kernel.matvec_kernel.cache_clear()
    with bench.patched():
        run = ternary_kernel.matvec_kernel()

        def kernel(**call: Any) -> Any:
            calls.append(call["grid"])
            return run(**call)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ternary_kernel, "matvec_kernel", lambda: kernel)
            patch.setattr(proving, "_tried", Everything())
            cache = [KVCache() for _ in model.layers]
            parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 20), (20, 23), (23, 24))]
    ternary_kernel.matvec_kernel.cache_clear()
    assert len(calls) == 2 * len(checkpoints.linears(config))  # not for twenty rows
    logits = np.array(mx.concatenate(parts, axis=1)[0])
    np.testing.assert_allclose(logits, expected, atol=2e-6 * np.abs(expected).max())
