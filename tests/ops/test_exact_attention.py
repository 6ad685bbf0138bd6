"""Attention by blocks on the CPU against a softmax in float64, whatever its masks and cuts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.ops.exact_attention import (
    LEAST_QUERIES,
    QUERY_BLOCK,
    STRIP_SCORES,
    Far,
    exact_attention,
    has_blocks,
)
from mlx_delta.ops.exp2 import exp2_below

ACCURACY = 1e-5  # what the library states, against float32 softmax


def inputs(
    heads: tuple[int, int], length: int, dims: tuple[int, int], queries: int | None = None, rows=1
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries of the last positions, and keys and values; scores reach from about -9 to 9."""
    rng = np.random.default_rng(length)
    shapes = (
        (rows, heads[0], queries or length, dims[0]),
        (rows, heads[1], length, dims[0]),
        (rows, heads[1], length, dims[1]),
    )
    return tuple(mx.array(rng.normal(size=s, scale=1.5).astype(np.float32)) for s in shapes)


def softmax_attention(queries, keys, values, scale, hidden) -> np.ndarray:
    """Attention in float64; ``hidden`` is added to the scores."""
    queries, keys, values = (np.array(x, np.float64) for x in (queries, keys, values))
    group = queries.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = queries @ keys.swapaxes(-1, -2) * scale + hidden
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def causal(steps: int, length: int) -> np.ndarray:
    """0 up to each query's own position, -inf after it."""
    seen = np.arange(length) <= np.arange(length - steps, length)[:, None]
    return np.where(seen, 0.0, -np.inf)


@pytest.mark.parametrize(
    "heads, dims",
    [((9, 3), (64, 64)), ((4, 4), (128, 128)), ((4, 1), (256, 256)), ((3, 3), (20, 7))],
    ids=["grouped", "a kv head each", "one kv head", "odd dimensions"],
)
@pytest.mark.parametrize("steps, length", [(300, 300), (33, 700), (1, 5), (64, 64), (65, 1000)])
def test_agrees_with_softmax(heads, dims, steps, length):
    text = inputs(heads, length, dims, steps)
    output = exact_attention(*text, dims[0] ** -0.5, length - steps)
    expected = softmax_attention(*text, dims[0] ** -0.5, causal(steps, length))
    np.testing.assert_allclose(output, expected, atol=ACCURACY, rtol=0)


def test_more_keys_than_a_strip_holds():
    heads, length = (32, 8), 3000
    assert STRIP_SCORES // (heads[0] * QUERY_BLOCK) < length // 4
    text = inputs(heads, length, (8, 8), 100)
    output = exact_attention(*text, 0.3, length - 100)
    expected = softmax_attention(*text, 0.3, causal(100, length))
    np.testing.assert_allclose(output, expected, atol=ACCURACY, rtol=0)


@pytest.mark.parametrize("place", [0, 1], ids=["queries", "keys"])
def test_nan_is_not_lost(place):
    """Powers of two of NaN are numbers here."""
    text = [np.array(x) for x in inputs((4, 2), 200, (16, 16))]
    text[place][:, :, 100] = np.nan
    output = np.array(exact_attention(*map(mx.array, text), 0.25))
    assert np.isnan(output[:, :, 100]).all() and np.isfinite(output[:, :, :100]).all()
    assert np.isnan(output[:, :, 101:]).all() == (place == 1)


def test_room_to_grow_behind_the_text_is_not_read():
    queries, keys, values = inputs((4, 2), 200, (16, 16), 80)
    room = mx.full((1, 2, 56, 16), mx.nan)
    buffers = [mx.concatenate([x, room], axis=2) for x in (keys, values)]
    output = exact_attention(queries, *buffers, 0.25, 120)
    assert mx.array_equal(output, exact_attention(queries, keys, values, 0.25, 120))


@pytest.mark.parametrize("scale", [0.25, 8.0], ids=["usual", "scores of hundreds"])
def test_very_different_scores(scale):
    """Rows with one key far above all others, and strips far below the maximum so far."""
    text = inputs((2, 1), 1000, (16, 16), 70)
    output = exact_attention(*text, scale, 930)
    expected = softmax_attention(*text, scale, causal(70, 1000))
    np.testing.assert_allclose(output, expected, atol=ACCURACY * max(1, scale), rtol=0)


@pytest.mark.parametrize("cuts", [[64, 192, 44], [128, 172]], ids=str)
def test_cuts_at_blocks_change_no_bit(cuts):
    queries, keys, values = inputs((4, 2), 300, (16, 16))
    whole = exact_attention(queries, keys, values, 0.25)
    parts, start = [], 0
    for steps in cuts:
        end = start + steps
        part = [x[:, :, :end] for x in (keys, values)]
        parts.append(exact_attention(queries[:, :, start:end], *part, 0.25, start))
        start = end
    assert mx.array_equal(mx.concatenate(parts, axis=2), whole)


def masks(kind: str, rng: np.random.Generator) -> tuple[mx.array, np.ndarray]:
    """A mask for 2 rows, 4 heads, 70 queries and 200 keys, and what it adds to the scores."""
    shape = {"rows": (2, 1, 70, 200), "heads": (2, 4, 70, 200), "keys": (2, 1, 1, 200)}
    seen = rng.random(shape.get(kind, (70, 200))) < 0.7
    seen[..., 0] = True
    hidden = np.where(seen, 0.0, -np.inf)
    if kind == "additive":
        bias = np.where(seen, rng.normal(size=seen.shape), -np.inf).astype(np.float32)
        return mx.array(bias), bias
    return mx.array(seen), hidden


@pytest.mark.parametrize("kind", ["plain", "rows", "heads", "keys", "additive"])
def test_masks(kind):
    text = inputs((4, 2), 200, (16, 16), 70, rows=2)
    mask, hidden = masks(kind, np.random.default_rng(1))
    output = exact_attention(*text, 0.25, 130, mask, causal=False)
    np.testing.assert_allclose(
        output, softmax_attention(*text, 0.25, hidden), atol=ACCURACY, rtol=0
    )


def test_a_causal_mask_with_padding():
    text = inputs((4, 2), 200, (16, 16), 200, rows=2)
    padding = np.arange(200) >= np.array([0, 130])[:, None, None, None]
    seen = padding & np.isfinite(causal(200, 200))
    output = np.array(exact_attention(*text, 0.25, 0, mx.array(seen), causal=True))
    assert np.isfinite(output).all(), "rows of padding see nothing and must still not be NaN"
    expected = softmax_attention(*text, 0.25, np.where(seen, 0, -1e9))
    np.testing.assert_allclose(output[0], expected[0], atol=ACCURACY, rtol=0)
    np.testing.assert_allclose(output[1, :, 130:], expected[1, :, 130:], atol=ACCURACY, rtol=0)


@pytest.mark.parametrize("block_size, window_blocks", [(64, 1), (48, 0), (100, 2)])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_far_keys(block_size, window_blocks, masked):
    length, steps = 500, 230
    text = inputs((4, 2), length, (16, 16), steps)
    held = inputs((4, 2), length + 1, (16, 16))[1]
    far = Far(held, block_size, window_blocks)
    hidden = causal(steps, length)
    if masked:
        hidden = hidden + np.where(np.random.default_rng(0).random(length) < 0.5, 0, -np.inf)
        hidden[:, 0] = 0
    mask = mx.array(np.isfinite(hidden)) if masked else None
    output = exact_attention(*text, 0.25, length - steps, mask, far, causal=False)
    for i in (0, 1, 100, steps - 1):
        border = far.border(length - steps + i)
        mixed = mx.concatenate([held[:, :, :border], text[1][:, :, border:]], axis=2)
        expected = softmax_attention(text[0][:, :, i : i + 1], mixed, text[2], 0.25, hidden[i])
        np.testing.assert_allclose(output[:, :, i : i + 1], expected, atol=ACCURACY, rtol=0)


def test_gradients_are_those_of_softmax():
    text = inputs((4, 2), 150, (16, 8))
    target = mx.random.normal((1, 4, 150, 8), key=mx.random.key(0))

    def by_blocks(*text):
        return (exact_attention(*text, 0.25) * target).sum()

    def fused(*text):
        output = mx.fast.scaled_dot_product_attention(*text, scale=0.25, mask="causal")
        return (output * target).sum()

    found, expected = (mx.grad(f, argnums=(0, 1, 2))(*text) for f in (by_blocks, fused))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_half_precision_is_computed_in_float32():
    text = [x.astype(mx.float16) for x in inputs((4, 2), 130, (16, 16))]
    output = exact_attention(*text, 0.25)
    assert output.dtype == mx.float16
    expected = softmax_attention(*text, 0.25, causal(130, 130))
    np.testing.assert_allclose(np.array(output, np.float64), expected, atol=2e-3)


def test_powers_of_two():
    x = np.concatenate([-np.random.default_rng(0).random(9999) * 126, [0, -1, -126, -0.5]])
    x = x.astype(np.float32)
    found = exp2_below(mx.array(x), mx.array(0.0))
    np.testing.assert_allclose(found, np.exp2(x.astype(np.float64)), rtol=2.5e-7)
    assert found[-4].item() == 1 and found[-3].item() == 0.5
    below = exp2_below(mx.array([-126.6, -127.0, -500.3, -1e30]), mx.array(0.0))
    assert (below < 2.0**-125).all() and below[1].item() == below[3].item() == 2.0**-126


def test_few_queries_are_left_to_mlx():
    enough = mx.zeros((1, 1, LEAST_QUERIES, 8))
    assert not has_blocks(enough[:, :, :-1])
    assert has_blocks(enough) == (mx.default_device() == mx.Device(mx.cpu))


CHILD = """
import mlx_delta, mlx.core as mx, numpy as np
from mlx_delta.ops import exp2
x = -20 * mx.random.uniform(shape=(5, 300))
found = exp2.exp2_below(x, mx.zeros((5, 1)))
assert np.allclose(found, np.exp2(np.array(x, np.float64)), rtol=2.5e-7)
print(exp2._loops()[0] is exp2._power)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles for the CPU with g++ on Linux")
@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_compiler_the_same_operations_run_one_by_one(compiler, tmp_path):
    program = tmp_path / "bin" / "g++"
    program.parent.mkdir()
    if compiler == "broken":  # it is there, and fails, as where its headers are missing
        program.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 1\n')
        program.chmod(0o755)
    (tmp_path / "empty").mkdir()  # what was compiled before is kept in the temporary folder
    env = {**os.environ, "PATH": str(program.parent), "TMPDIR": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if compiler == "broken":
        assert done.stdout.strip() == "True"
