"""The kernel values_encode: words and scales are the specification's, bit for bit."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import values as ref
from mlx_delta.ops import blocks, turned, values_encode
from mlx_delta.widths import VALUE_WIDTHS

from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .code_case import coded, fed_batch
from .common import STORED, as_float, every_run, on_bench, source_of, special_keys, with_kernel

ALL = (3, 8, 2, 6, 4, 5)
assert set(ALL) == set(VALUE_WIDTHS)


def numbers(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Values [B, Hkv, L, D], tokens of very different sizes."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=shape) * np.exp(2 * rng.normal(size=(*shape[:-1], 1)))
    return mx.array(own.astype(np.float32)).astype(dtype)


def check(values: mx.array, widths: tuple[int, ...]) -> None:
    """Code values [B, Hkv, L, D]; all is as specified, and as the operations have it."""
    B, H, L, D = values.shape
    words, scales = (np.array(x) for x in values_encode.encode(values, widths))
    assert words.shape == (B, 1, L, sum(ref.value_words(D, widths)))
    assert scales.shape == (B, 1, L, H * D // ref.value_group(D))
    if mx.default_device() == mx.Device(mx.cpu):
        wanted = turned.encode_values(values, widths)
        np.testing.assert_array_equal(words, np.array(wanted[0]))
        np.testing.assert_array_equal(scales, np.array(wanted[1]))
    for row, token in np.ndindex(B, L):
        own = as_float(values[row, :, token])
        found = ref.encode_value(own, widths, STORED[values.dtype])
        np.testing.assert_array_equal(words[row, 0, token], found[0])
        np.testing.assert_array_equal(scales[row, 0, token], found[1])


@every_run
def test_all_widths(bench: MetalBench, options):
    with on_bench(bench, **options):
        check(numbers((2, 6, 5, 96), mx.float16), ALL)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(32, mx.bfloat16), (64, mx.float16), (128, mx.bfloat16), (256, mx.float16)],
)
def test_shapes(bench: MetalBench, request, head_dim, dtype):
    if head_dim < 256 and not request.config.getoption("--all"):
        pytest.skip("each shape is compiled anew; --all takes all")
    with on_bench(bench):
        check(numbers((1, 2, 4, head_dim), dtype), (4, 3))


@pytest.mark.parametrize("kind", ["constant", "extreme", "nan", "inf", "huge", "tiny"])
def test_special_values(bench: MetalBench, kind):
    dtype = mx.bfloat16 if kind == "huge" else mx.float16
    if kind in ("huge", "tiny"):
        values = numbers((1, 2, 4, 96), dtype) * (1e37 if kind == "huge" else 1e-6)
    else:
        values = special_keys(kind, (1, 2, 10, 96), dtype)
    with on_bench(bench):
        check(values, (2, 5))


def test_a_cache_encodes_with_it_whatever_its_rows_are_at(bench: MetalBench):
    """Rows of several lengths, fed token by token: the store has what operations put there."""
    setting = coded((), (3, 5), block_size=16, window=16, sinks=2)

    def stored() -> list[np.ndarray]:
        return [np.array(x) for x in fed_batch(setting, 32)._values.codes]

    wanted = stored()
    with (
        on_bench(bench),
        mock.patch.object(blocks, "values_encode", wraps=values_encode) as spy,
    ):
        for found, own in zip(stored(), wanted, strict=True):
            np.testing.assert_array_equal(found, own)
    assert spy.encode.called


MUTATIONS = [
    without_barrier(1, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
    Mutation("turned values are not rounded", "float(to_stored<S>(x[g * Own + i]))",
             "x[g * Own + i]"),
    Mutation("rounded beyond the range", "value > most ? most : value", "value"),
    Mutation("sums only", "int(lane) & apart ? other - x[k] :", ""),
    Mutation("a NaN of another lane is not seen", "!simd_any(!finite)", "finite"),
    Mutation("what is not finite has a scale", "finite ? best : VALUE_NO_SCALE", "best"),
    Mutation("what is not finite is coded", "finite ? float(to_stored", "true ? float(to_stored"),
    Mutation("the largest of one lane", "simd_max(largest)", "largest"),
    Mutation("bytes are cut off", "(bits + 64u) >> 7", "bits >> 7"),
    Mutation(
        "scales beyond the largest",
        "min(uint(short_step(simd_max(largest) / half_way)), 0xf6u)",
        "uint(short_step(simd_max(largest) / half_way))",
    ),
    Mutation("nothing above the nearest", "0xf6u) + 1u", "0xf6u)"),
    Mutation("one scale is tried", "lower < VALUE_SCALES", "lower < 1"),
    Mutation("errors of one lane", "sum_of_lanes(squares) +", "squares +"),
    Mutation("errors along the numbers of one lane", "along = sum_of_lanes(along);", ""),
    Mutation("errors along the numbers are as others", "(VALUE_ALONG, along)", "(1.0f, along)"),
    Mutation("the power of one lane", "power = sum_of_lanes(power);", ""),
    Mutation("codes at the border of theirs", "half_way) + 0.5f", "half_way)"),
    Mutation("no scale", "scale > 0.0f ? clamp", "true ? clamp"),
    Mutation("the largest is not cut off", "half_way - 1.0f)", "half_way)"),
    Mutation("codes below zero", "unit, half_way) + half_way", "unit, half_way)"),
    Mutation("what a word begins with", "at < 0 ? bits >> -at : bits << at",
             "at < 0 ? 0u : bits << at"),
    Mutation("another head's width", "heads[2 * own],", "heads[0],"),
    Mutation("another head's words", "+ heads[2 * own + 1],", ","),
    Mutation("another row's tokens", "long(head / Heads) * tokens", "0"),
    Mutation("tokens past the last", "if (token >= tokens) {", "if (false) {"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    def cases() -> None:
        check(numbers((2, 2, 3, 96), mx.float16), (3, 5))
        for kind in ("extreme", "nan", "inf"):
            check(special_keys(kind, (1, 2, 10, 96), mx.float16), (2, 5))
        check(numbers((1, 2, 4, 96), mx.bfloat16) * 1e37, (2, 5))

    run = with_kernel(bench, "values_encode_kernel", cases)
    assert_caught(source_of("values_encode_kernel"), mutation, run)


def test_what_it_does_not_take(bench: MetalBench):
    values = mx.zeros((1, 2, 4, 64), mx.float16)
    for wrong, widths, message in (
        (values.astype(mx.float32), (4, 4), "float16 or bfloat16 values"),
        (values[..., :48], (4, 4), r"a multiple of 32 channels up to 256 but got .* 48\)"),
        (values[:, :, :0], (4, 4), "float16 or bfloat16 values"),
        (values, (4,), r"widths \(4,\) do not fit 2 kv heads"),
        (values, (4, 7), r"widths \(4, 7\) do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            values_encode.encode(wrong, widths)
