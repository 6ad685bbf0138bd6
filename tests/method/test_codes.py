"""The specification of codes of several widths, and of turned values, against itself and MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import codes as ref
from mlx_delta.method.storage import block_grid, decode_values, encode_values
from mlx_delta.widths import VALUE_WIDTHS

KEYS = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float16).astype(np.float32)
# Of each width some pairs (d, d + 16), in no order; 6 and 3 bits leave a part of a word empty.
WIDTHS = np.tile(
    np.random.default_rng(1).permutation(np.repeat([8, 6, 4, 3, 2], [2, 3, 4, 5, 2])), 2
)


def test_order_puts_wide_channels_first():
    widths = np.stack([WIDTHS, WIDTHS[::-1]])
    order, classes = ref.order_of(widths)
    assert classes == ((8, 4), (6, 6), (4, 8), (3, 10), (2, 4))
    for own, row in zip(widths, order, strict=True):
        np.testing.assert_array_equal(own[row], ref.channel_widths(classes))
        assert all(np.all(np.diff(row[channels]) > 0) for _, channels, _ in ref.class_runs(classes))


def test_words_hold_neighbouring_channels_lowest_bits_first():
    order, classes = ref.order_of(WIDTHS[None])
    block = ref.code_block(KEYS, order[0], classes, "float16")
    assert block.words.shape == (1 + 2 + 1 + 1 + 1, 64) == (ref.count_rows(classes), 64)
    low, step = block.grid
    # The second row: channels 0 to 4 of the class of 6 bits, which is the fifth channel on.
    for i in range(5):
        channel = order[0][4 + i]
        code = (block.words[1] >> np.uint32(6 * i)) & 63
        np.testing.assert_allclose(low[4 + i] + step[4 + i] * code, KEYS[:, channel], atol=0.1)
    assert not (block.words[1] >> np.uint32(30)).any()


def test_decoded_keys_are_half_a_step_away_unless_they_lie_beyond_the_grid():
    order, classes = ref.order_of(WIDTHS[None])
    block = ref.code_block(KEYS, order[0], classes, "float16")
    decoded = ref.decode_block(block, order[0], classes, "float16")
    low, step = np.empty((2, 32), np.float32)
    low[order[0]], step[order[0]] = block.grid
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
        return float(np.square(decode_values(codes, grid, "float16") - KEYS).mean())

    assert error(fitted) < 0.85 * error(plain)


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
    order, classes = ref.order_of(WIDTHS[None])
    block = ref.code_block(keys, order[0], classes, "bfloat16")
    decoded = ref.decode_block(block, order[0], classes, "bfloat16")
    assert np.isnan(decoded[:, 3]).all() and np.isfinite(np.delete(decoded, 3, axis=1)).all()


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_the_matrix_is_mlx_s_and_undoes_itself(head_dim):
    matrix = ref.hadamard(head_dim)
    np.testing.assert_allclose(matrix @ matrix, np.eye(head_dim), atol=1e-6)
    size = ref.hadamard_size(head_dim)
    x = KEYS.ravel()[: 2 * head_dim].reshape(2, -1, size)
    turned = mx.hadamard_transform(mx.array(x)).reshape(2, head_dim)
    np.testing.assert_allclose(np.array(turned), x.reshape(2, head_dim) @ matrix, atol=1e-5)


@pytest.mark.parametrize("width", VALUE_WIDTHS)
@pytest.mark.parametrize("head_dim", [96, 128])
def test_values_are_mlx_s_codes(width, head_dim):
    widths, group = (width, 4), ref.value_group(head_dim)
    turned = ref.turn(KEYS.ravel()[: 2 * head_dim].reshape(2, head_dim), "float16")
    parts = [mx.quantize(mx.array(x)[None], group, w) for x, w in zip(turned, widths, strict=True)]
    words, scales, biases = (np.concatenate([np.array(p[i][0]) for p in parts]) for i in range(3))
    assert len(words) == sum(ref.value_words(head_dim, widths))
    values = ref.decode_value(words, scales, biases, widths, head_dim)
    dense = [mx.dequantize(*p, group, w)[0] for p, w in zip(parts, widths, strict=True)]
    np.testing.assert_allclose(values, np.stack([np.array(x) for x in dense]), atol=1e-5)
