"""The specification of codes of several widths, and of turning, against itself and MLX."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import codes as ref
from mlx_delta.method.storage import block_grid, decode_values, encode_values
from mlx_delta.widths import FIELDS

KEYS = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float16).astype(np.float32)
# Pairs (d, d + 16) of each width, in no order.
HALF = np.array([3, 5, 3, 6, 3, 8, 2, 3, 4, 3, 2, 8, 3, 5, 3, 3])
WIDTHS = np.tile(HALF, 2)


def test_order_gives_each_field_the_next_pair_of_its_width():
    order, rows = ref.order_of(WIDTHS)
    assert rows == (1, 1, 0, 1, 1, 0)
    lower = [[5, 11], [1, 13, 3], [0, 2, 4, 7, 8], [6, 10, 9, 12, 14, 15]]
    assert order.tolist() == [x for row in lower for x in [*row, *(16 + d for d in row)]]
    np.testing.assert_array_equal(WIDTHS[order], ref.slots_of(rows).width)


@pytest.mark.parametrize("kind", FIELDS)
def test_a_word_has_no_bit_to_spare(kind):
    """Codes of every kind of row fill its words: no two overlap, none is left out."""
    rows = tuple(int(kind == other) for other in FIELDS)
    row, shift, width = ref.slots_of(rows)
    masks = [((1 << int(w)) - 1) << int(s) for s, w in zip(shift, width, strict=True)]
    assert len(row) == 2 * kind and not row.any()
    assert sum(masks) == np.bitwise_or.reduce(masks) == 2**32 - 1
    assert all(s // 16 == (s + w - 1) // 16 for s, w in zip(shift, width, strict=True))


def test_widths_that_fill_no_rows_are_refused():
    with pytest.raises(ValueError, match="widths .* fill no rows of words"):
        ref.order_of(np.full(32, 3))


def test_words_hold_codes_lowest_bits_first():
    order, rows = ref.order_of(WIDTHS)
    block = ref.code_block(KEYS, order, rows, "float16")
    assert block.words.shape == (4, 64)
    low, step = block.grid
    # The second row: pairs of 5, 5 and 6 bits, whose slots are the fifth to the tenth.
    for slot, shift, width in [(4, 0, 5), (5, 5, 5), (6, 10, 6), (7, 16, 5), (9, 26, 6)]:
        code = (block.words[1] >> np.uint32(shift)) & np.uint32(2**width - 1)
        near = low[slot] + step[slot] * code
        np.testing.assert_allclose(near, KEYS[:, order[slot]], atol=0.12)


def test_decoded_keys_are_half_a_step_away_unless_they_lie_beyond_the_grid():
    order, rows = ref.order_of(WIDTHS)
    block = ref.code_block(KEYS, order, rows, "float16")
    decoded = ref.decode_block(block, order, rows, "float16")
    low, step = np.empty((2, 32), np.float32)
    low[order], step[order] = block.grid
    high = low + step * (2.0**WIDTHS - 1)
    beyond = np.maximum(0, np.maximum(low - KEYS, KEYS - high))
    assert (np.abs(decoded - KEYS) <= np.maximum(step / 2, beyond) + 2e-3).all()
    assert (beyond > step / 2).mean() < 0.05


def test_a_fitted_grid_errs_less_than_one_over_the_range():
    bits = np.full(32, 3)
    plain = block_grid(KEYS, bits, "float16")
    fitted = ref.fit_grid(KEYS, bits, "float16")

    def error(grid: np.ndarray) -> float:
        codes = encode_values(KEYS, grid, bits)
        squares = np.square(decode_values(codes, grid, "float16") - KEYS).mean(axis=1)
        return float((ref.token_shares(KEYS, plain) * squares).sum())

    assert error(fitted) < 0.9 * error(plain)


def test_tokens_that_stand_out_count_more_and_err_less():
    rng = np.random.default_rng(3)
    keys = rng.normal(size=(64, 32)).astype(np.float32)
    keys[17] *= 4
    bits = np.full(32, 3)
    grid = block_grid(keys, bits, "float16")
    weights = ref.token_shares(keys, grid)
    assert weights.argmax() == 17 and weights.sum() == pytest.approx(1)
    assert weights.max() <= ref.MOST_WEIGHT**2 * weights.min() * 1.0001
    fitted = ref.fit_grid(keys, bits, "float16")
    with mock.patch.object(ref, "token_shares", lambda keys, *_: np.full(len(keys), 1 / len(keys))):
        alike = ref.fit_grid(keys, bits, "float16")
    errors = [
        np.square(decode_values(encode_values(keys, x, bits), x, "float16") - keys)[17].sum()
        for x in (fitted, alike)
    ]
    assert errors[0] < 0.5 * errors[1]
    keys[3, 5] = np.inf  # of a channel that is lost, nothing is to be seen
    without = np.delete(np.arange(32), 5)
    own = ref.token_shares(keys, block_grid(keys, bits, "float16"))
    others = ref.token_shares(keys[:, without], grid[:, without])
    np.testing.assert_allclose(own, others, rtol=1e-5)
    keys[3, 5] = 0
    keys[40, 9] = 9  # in a channel that the model minds, or does not
    grid = block_grid(keys, bits, "float16")
    plain = np.zeros(32, np.float32)
    seen, unseen = (
        ref.token_shares(keys, grid, np.stack([np.where(np.arange(32) == minded, 1, 1e-6), plain]))
        for minded in (9, 8)
    )
    assert seen[40] == seen.max() and unseen[40] < unseen.max()
    along = np.where(np.arange(32) == 9, 1, plain)  # or that queries look along
    looked_at = ref.token_shares(keys, grid, np.stack([plain + 1, along]))
    assert looked_at[40] == looked_at.max()
    np.testing.assert_array_equal(ref.token_shares(np.ones((8, 4)), np.zeros((2, 4))), 1 / 8)


def test_grids_of_keys_that_hardly_vary():
    keys = np.zeros((8, 4), np.float32)
    keys[:, 1] = 3
    keys[3, 2] = 6e-8  # a step that float16 hardly holds
    keys[:, 3] = np.linspace(-65504, 65504, 8)
    bits = np.full(4, 4)
    grid = ref.fit_grid(keys, bits, "float16")
    decoded = decode_values(encode_values(keys, grid, bits), grid, "float16")
    np.testing.assert_allclose(decoded[:, :3], keys[:, :3], atol=1e-7)
    assert np.abs(decoded - keys).max() < 0.55 * 2 * 65504 / 15


def test_a_channel_with_a_nan_is_nan_throughout():
    keys = KEYS.copy()
    keys[5, 3] = np.nan
    order, rows = ref.order_of(WIDTHS)
    block = ref.code_block(keys, order, rows, "bfloat16")
    decoded = ref.decode_block(block, order, rows, "bfloat16")
    assert np.isnan(decoded[:, 3]).all() and np.isfinite(np.delete(decoded, 3, axis=1)).all()


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_the_matrix_is_mlx_s_and_undoes_itself(head_dim):
    matrix = ref.hadamard(head_dim)
    np.testing.assert_allclose(matrix @ matrix, np.eye(head_dim), atol=1e-6)
    size = ref.hadamard_size(head_dim)
    x = KEYS.ravel()[: 2 * head_dim].reshape(2, -1, size)
    turned = mx.hadamard_transform(mx.array(x)).reshape(2, head_dim)
    np.testing.assert_allclose(np.array(turned), x.reshape(2, head_dim) @ matrix, atol=1e-5)
