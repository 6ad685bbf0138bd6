"""The specification of values as codes, against itself, brute force and MLX."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import values as ref
from mlx_delta.method.codes import turn
from mlx_delta.method.storage import LARGEST_STEP, round_to, short_steps, whole_steps
from mlx_delta.widths import VALUE_WIDTHS

NUMBERS = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float16).astype(np.float32)
SCALES = whole_steps(np.arange(LARGEST_STEP + 1, dtype=np.uint8))


@pytest.mark.parametrize("width", VALUE_WIDTHS)
@pytest.mark.parametrize("head_dim", [96, 128])
def test_mlx_reads_the_words(width, head_dim):
    widths, group = (width, 4), ref.value_group(head_dim)
    words, scales = ref.encode_value(np.resize(NUMBERS, (2, head_dim)), widths, "float16")
    ends = np.cumsum(ref.value_words(head_dim, widths))
    assert len(words) == ends[-1] and scales.shape == (2 * head_dim // group,)
    found = ref.decode_value(words, scales, widths, head_dim)
    of_heads = zip(np.split(words, ends[:1]), np.split(scales, 2), widths, strict=True)
    for head, (codes, bytes_, bits) in enumerate(of_heads):
        unit = mx.array(whole_steps(bytes_))[None]
        dense = mx.dequantize(mx.array(codes)[None], unit, unit * ((1 - 2**bits) / 2), group, bits)
        np.testing.assert_array_equal(np.array(dense).ravel(), found[head])


@pytest.mark.parametrize("width", VALUE_WIDTHS)
def test_no_other_code_errs_less_and_none_of_the_scales_costs_less(width):
    codes, bytes_ = ref.encode_groups(NUMBERS, width)
    grid = np.arange(2**width) - (2**width - 1) / 2

    def nearest(scales: np.ndarray) -> np.ndarray:
        levels = scales[:, None, None] * grid
        index = np.abs(NUMBERS[..., None] - levels).argmin(axis=2)
        return np.take_along_axis(levels[:, 0], index, axis=1)

    def cost(found: np.ndarray) -> np.ndarray:
        errors = NUMBERS - found
        along = (errors * NUMBERS).sum(axis=1) ** 2 / np.square(NUMBERS).sum(axis=1)
        return np.square(errors).sum(axis=1) + 64 * along

    own = ref.numbers_of(codes, whole_steps(bytes_), width)
    errors, least = (np.abs(NUMBERS - x) for x in (own, nearest(whole_steps(bytes_))))
    np.testing.assert_allclose(errors, least, rtol=1e-5, atol=1e-6)
    top = short_steps(np.abs(NUMBERS).max(axis=1) / np.float32(2 ** (width - 1))).astype(int)
    costs = []
    for scales in (SCALES[top - lower] for lower in range(-1, 3)):
        costs.append(cost(ref.numbers_of(ref.codes_of(NUMBERS, scales, width), scales, width)))
    np.testing.assert_allclose(cost(own), np.min(costs, axis=0), rtol=1e-3)
    if width == 2:  # where the largest numbers are often cut off
        assert (bytes_ < top).mean() > 0.3


@pytest.mark.parametrize("width", [2, 3, 4])
def test_values_shrink_less_than_by_the_least_squared_error(width):
    """Of many values the parts along them add up: those errors have to be small."""

    def length() -> float:
        codes, bytes_ = ref.encode_groups(NUMBERS, width)
        found = ref.numbers_of(codes, whole_steps(bytes_), width)
        return float(((found * NUMBERS).sum(axis=1) / np.square(NUMBERS).sum(axis=1)).mean())

    own = length()
    with mock.patch.object(ref, "ALONG", np.float32(0)):
        shrunk = length()
    assert abs(own - 1) < min(0.04, abs(shrunk - 1))


@pytest.mark.parametrize(("width", "share"), [(2, 0.9), (3, 1.06)])
def test_it_errs_as_much_as_a_scale_and_an_offset_of_16_bits(width, share):
    codes, bytes_ = ref.encode_groups(NUMBERS, width)
    found = ref.numbers_of(codes, whole_steps(bytes_), width)
    affine = mx.quantize(mx.array(NUMBERS).astype(mx.float16), 64, width)
    others = np.array(mx.dequantize(*affine, 64, width).astype(mx.float32))
    errors = [np.square(x - NUMBERS).mean() for x in (found, others)]
    assert errors[0] < share * errors[1]


def test_of_scales_that_err_alike_the_largest_is_taken():
    """Of numbers beyond all scales, as bfloat16 has them, squared errors are all infinite."""
    numbers = np.full((1, 32), np.float32(3e38))
    codes, bytes_ = ref.encode_groups(numbers, 3)
    assert bytes_ == LARGEST_STEP and (codes == 7).all()


def test_values_of_nothing_and_of_what_is_not_finite():
    values = NUMBERS[:6].copy()
    values[0] = 0
    values[1] = round_to(values[1] * 1e-6, "float16")  # scales that a byte hardly holds
    values[2, 3] = np.nan
    values[3, 4] = -np.inf
    values[4] = 65504  # which turned are beyond the type
    codes, scales = ref.encode_head(values, 4, "float16")
    assert (codes[0] == 8).all() and scales[0] == 0 and (scales[2:4] == ref.NO_SCALE).all()
    found = ref.numbers_of(codes, whole_steps(scales[:, 0]), 4)
    assert (found[0] == 0).all() and np.isnan(found[2:4]).all()
    np.testing.assert_allclose(found[1], turn(values[1], "float16"), atol=4e-6)
    assert 4e4 < found[4, 0] <= 65504
    # The largest are cut off.
    np.testing.assert_allclose(found[5], turn(values[5], "float16"), atol=0.5)


def test_a_head_without_groups_is_refused():
    with pytest.raises(ValueError, match="multiple of 32 but got 48; give value_bits=16"):
        ref.value_group(48)
