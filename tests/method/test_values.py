"""The specification of values as codes, against itself, brute force and MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import values as ref
from mlx_delta.method.codes import turn
from mlx_delta.method.storage import round_to
from mlx_delta.widths import VALUE_WIDTHS

NUMBERS = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float16).astype(np.float32)
SCALES = ref.scale_of(np.arange(ref.LARGEST_SCALE + 1, dtype=np.uint8))


@pytest.mark.parametrize("width", VALUE_WIDTHS)
@pytest.mark.parametrize("head_dim", [96, 128])
def test_mlx_reads_the_words(width, head_dim):
    widths, group = (width, 4), ref.value_group(head_dim)
    own = turn(np.resize(NUMBERS, (2, head_dim)), "float16")
    words, scales = ref.encode_value(own, widths)
    ends = np.cumsum(ref.value_words(head_dim, widths))
    assert len(words) == ends[-1] and scales.shape == (2 * head_dim // group,)
    found = ref.decode_value(words, scales, widths, head_dim)
    of_heads = zip(np.split(words, ends[:1]), np.split(scales, 2), widths, strict=True)
    for head, (codes, bytes_, bits) in enumerate(of_heads):
        unit = mx.array(ref.scale_of(bytes_))[None]
        dense = mx.dequantize(mx.array(codes)[None], unit, unit * ((1 - 2**bits) / 2), group, bits)
        np.testing.assert_array_equal(np.array(dense).ravel(), found[head])


def test_scales_are_halves_without_what_a_byte_has_no_room_for():
    assert SCALES[0] == 0 and SCALES[-1] == 61440 and (np.diff(SCALES) > 0).all()
    assert SCALES[[15 << 3, (15 << 3) + 1, 14 << 3]].tolist() == [1, 1.125, 0.5]
    assert not np.isfinite(ref.scale_of(np.arange(248, 256, dtype=np.uint8))).any()


def test_a_byte_is_the_nearest_one():
    own = np.random.default_rng(1).uniform(0, 4, 500).astype(np.float32)
    own = np.concatenate([own, own * 1e-4, SCALES, [7e4, np.float32(3e38)]]).astype(np.float32)
    halves = round_to(own, "float16")
    found = ref.scale_of(ref.nearest_byte(own))
    nearest = np.abs(SCALES - halves[:, None]).min(axis=1)
    np.testing.assert_array_equal(np.abs(found - halves), nearest)


@pytest.mark.parametrize("width", VALUE_WIDTHS)
def test_no_other_code_and_none_of_the_scales_above_and_below_errs_less(width):
    codes, bytes_ = ref.encode_groups(NUMBERS, width)
    grid = np.arange(2**width) - (2**width - 1) / 2
    apart = np.abs(NUMBERS[..., None] - ref.scale_of(bytes_)[:, None, None] * grid)
    own = np.take_along_axis(apart, codes[..., None].astype(int), axis=2)[..., 0]
    np.testing.assert_array_equal(own, apart.min(axis=2))
    top = ref.nearest_byte(np.abs(NUMBERS).max(axis=1) / np.float32(2 ** (width - 1))).astype(int)
    errors = []
    for lower in range(5):
        every = np.abs(NUMBERS[..., None] - SCALES[top - lower][:, None, None] * grid)
        errors.append(np.square(every.min(axis=2)).sum(axis=1))
    np.testing.assert_allclose(np.square(own).sum(axis=1), np.min(errors, axis=0), rtol=1e-5)
    if width == 2:  # where most is won by cutting off the largest numbers
        assert (bytes_ < top).all()


@pytest.mark.parametrize("width", [2, 3])
def test_it_errs_less_than_a_scale_and_an_offset_of_16_bits(width):
    codes, bytes_ = ref.encode_groups(NUMBERS, width)
    found = ref.numbers_of(codes, ref.scale_of(bytes_), width)
    affine = mx.quantize(mx.array(NUMBERS).astype(mx.float16), 64, width)
    others = np.array(mx.dequantize(*affine, 64, width).astype(mx.float32))
    errors = [np.square(x - NUMBERS).mean() for x in (found, others)]
    assert errors[0] < (0.8 if width == 2 else 0.97) * errors[1]


def test_of_scales_that_err_alike_the_largest_is_taken():
    """Of numbers beyond all scales, as bfloat16 has them, squared errors are all infinite."""
    numbers = np.full((1, 32), np.float32(3e38))
    codes, bytes_ = ref.encode_groups(numbers, 3)
    assert bytes_ == ref.LARGEST_SCALE and (codes == 7).all()


def test_groups_of_nothing_and_of_what_is_not_finite():
    numbers = NUMBERS[:5].copy()
    numbers[0] = 0
    numbers[1] = round_to(numbers[1] * 1e-6, "float16")  # scales that a byte hardly holds
    numbers[2, 3] = np.nan
    numbers[3, 4] = -np.inf
    codes, bytes_ = ref.encode_groups(numbers, 4)
    assert (codes[0] == 8).all() and bytes_[0] == 0 and (bytes_[2:4] == ref.NO_SCALE).all()
    found = ref.numbers_of(codes, ref.scale_of(bytes_), 4)
    assert (found[0] == 0).all() and np.isnan(found[2:4]).all()
    np.testing.assert_allclose(found[1], numbers[1], atol=4e-6)
    np.testing.assert_allclose(found[4], numbers[4], atol=0.5)  # the largest are cut off


def test_a_head_without_groups_is_refused():
    with pytest.raises(ValueError, match="multiple of 32 but got 48; give value_bits=16"):
        ref.value_group(48)
