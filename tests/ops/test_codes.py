"""Coded keys and turned values by MLX operations, against their specification."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method import codes as ref
from mlx_delta.method.values import decode_value, encode_value, value_words
from mlx_delta.models.parts import share_of_heads
from mlx_delta.ops import codes, turned
from mlx_delta.ops.blocks import unpack
from mlx_delta.widths import VALUE_WIDTHS

from ..tiny import smooth_keys

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
HALVES = {"float16": mx.float16, "bfloat16": mx.bfloat16}
# Rows of 2, 3, 5 and 6 pairs, and of 8 and 4; pairs (d, d + 16) alike.
WIDTHS = ("8365243332583333" * 2, "2424424224422442" * 2)


def as_float(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


WEIGHTS, SALIENCE = smooth_keys((2, 1, 2, 32))[:, 0] ** 2 / 10


@pytest.mark.parametrize(
    "felt",
    [None, (WEIGHTS, 0 * WEIGHTS), (WEIGHTS, SALIENCE)],
    ids=["", "weights", "weights and salience"],
)
@pytest.mark.parametrize("kind", HALVES)
def test_keys_are_coded_as_specified(kind, felt):
    config = DeltaConfig(key_format="codes", key_bits=4, key_widths=(WIDTHS,))
    keys = mx.array(smooth_keys((2, 2, 48, 32))).astype(HALVES[kind])
    coding = codes.Coding.of(config, 2, 32)
    assert coding.rows == ((1, 1, 0, 1, 1, 0), (0, 0, 2, 0, 0, 1))
    words, grid = codes.code_blocks(keys, coding, 16, codes.felt_by_place(felt, coding))
    assert words.shape == (2, 3, 4 + 3, 16)
    found = as_float(unpack(codes.CodedBlocks(words, grid, None, coding, 32), 3))
    differing = 0
    for row, head, block in np.ndindex(2, 2, 3):
        own = as_float(keys[row, head, block * 16 : block * 16 + 16])
        order, rows = np.array(coding.order[head]), coding.rows[head]
        mind = None if felt is None else np.stack([x[head] for x in felt])
        wanted = ref.code_block(own, order, rows, kind, mind)
        of_head = np.array(words[row, block, slice(*coding.first_rows[head : head + 2])])
        stored = ref.CodedBlock(of_head, as_float(grid[row, head, block]))
        # On a GPU sums may be in another order, and round a few grids otherwise.
        np.testing.assert_allclose(stored.grid, wanted.grid, rtol=0.01, atol=0.01)
        differing += (stored.words != wanted.words).sum()
        if ON_CPU and (felt is None or not felt[1].any()):  # an `exp` may have another last bit
            np.testing.assert_array_equal(stored.grid, wanted.grid)
            assert not differing
        np.testing.assert_array_equal(
            found[row, head, block * 16 : block * 16 + 16],
            ref.decode_block(stored, order, rows, kind),
        )
    assert differing <= words.size // 50


def test_words_of_a_share_of_heads_are_those_of_the_whole():
    config = DeltaConfig(key_format="codes", key_bits=4, key_widths=(WIDTHS,))
    keys = mx.array(smooth_keys((1, 2, 32, 32))).astype(mx.float16)
    whole = codes.code_blocks(keys, codes.Coding.of(config, 2, 32), 16)
    shares = [
        codes.code_blocks(keys[:, i : i + 1], codes.Coding.of(own, 1, 32), 16)
        for i, own in enumerate(share_of_heads(config, rank, 2) for rank in range(2))
    ]
    for part, axis in ((0, 2), (1, 1)):
        joined = mx.concatenate([share[part] for share in shares], axis=axis)
        assert mx.array_equal(joined, whole[part])


@pytest.mark.parametrize("head_dim", [32, 48])
def test_without_widths_keys_are_turned_first(head_dim):
    config = DeltaConfig(key_format="codes", key_bits=3.5)
    keys = mx.array(smooth_keys((1, 2, 64, head_dim))).astype(mx.float16)
    coding = codes.Coding.of(config, 2, head_dim)
    assert coding.turned and coding.all_rows * 32 / head_dim <= 2 * 3.5
    words, grid = codes.code_blocks(keys, coding, 64)
    own = ref.turn(as_float(keys[0, 1]), "float16")
    order = np.array(coding.order[1])
    wanted = ref.code_block(own, order, coding.rows[1], "float16")
    if ON_CPU:
        np.testing.assert_array_equal(as_float(grid[0, 1, 0]), wanted.grid)
    found = as_float(unpack(codes.CodedBlocks(words, grid, None, coding, head_dim), 1))[0, 1]
    decoded = ref.decode_block(wanted, order, coding.rows[1], "float16")
    np.testing.assert_allclose(
        found, decoded @ ref.hadamard(head_dim), atol=1.1 * wanted.grid[1].max() / head_dim**0.5
    )


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("kind", HALVES)
def test_values_are_coded_as_specified(kind, length):
    widths = (3, 3, 8, 2, 6, 4, 5)
    assert set(widths) == set(VALUE_WIDTHS)
    numbers = np.random.default_rng(0).normal(size=(2, 7, length, 96))
    numbers[0, 0] = 0
    numbers[0, 1] *= 1e-6  # so small that scales are few
    numbers[0, 2] *= 6e4  # beyond the largest half once they are turned
    numbers[0, 3, :, 5] = np.nan
    numbers[0, 4, :, 6] = np.inf
    numbers[1, 5] *= 1e-3
    values = mx.array(numbers.astype(np.float32)).astype(HALVES[kind])
    found = turned.encode_values(values, widths)
    words, scales = (np.array(x) for x in found)
    assert words.shape == (2, 1, length, sum(value_words(96, widths)))
    assert scales.shape == (2, 1, length, 7 * 3) and scales.dtype == np.uint8
    decoded = as_float(turned.decode_values(found, widths, 96, mx.float32))
    for row, token in np.ndindex(2, length):
        wanted = encode_value(as_float(values[row, :, token]), widths, kind)
        if ON_CPU:
            np.testing.assert_array_equal(words[row, 0, token], wanted[0])
            np.testing.assert_array_equal(scales[row, 0, token], wanted[1])
        own = decode_value(words[row, 0, token], scales[row, 0, token], widths, 96)
        full = as_float(turned.turn(mx.array(own)))
        np.testing.assert_array_equal(decoded[row, :, token], full)
