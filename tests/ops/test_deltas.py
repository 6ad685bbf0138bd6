"""Held keys by lanes in MLX operations, against their specification."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method import deltas as ref
from mlx_delta.ops import deltas
from mlx_delta.ops.blocks import unpack
from mlx_delta.sensitivities import Sensitivities

from ..tiny import smooth_keys

HALVES = {"float16": mx.float16, "bfloat16": mx.bfloat16}
# Lanes of 6, 4, 3 and 2 bits in the first head, of 5, 5, 3 and 2 in the second.
WIDTHS = ("6432" * 4 * 2, "5532" * 4 * 2)


def as_float(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def put_together(stored: deltas.StoredDeltas, coding: deltas.LaneCoding, size: int):
    """The blocks end to end, and not a word behind them."""
    words, counts = np.array(stored.words), np.array(stored.counts)
    B, H, n = counts.shape
    runs = [words[0, h, b, : counts[0, h, b]] for b in range(n) for h in range(H)]
    ends = np.cumsum([len(run) for run in runs])
    offsets = (ends - [len(run) for run in runs]).reshape(n, H).T[None]
    payload = mx.array(np.concatenate(runs)[None])
    offsets = mx.array(offsets.astype(np.int32))
    parts = stored.low, stored.steps, stored.sequence
    return deltas.DeltaBlocks(payload, offsets, *parts, None, coding, size)


@pytest.mark.parametrize(
    ("kind", "mode", "size"),
    [("float16", "optimal", 64), ("bfloat16", "greedy", 64), ("bfloat16", "optimal", 24)],
)
def test_keys_are_stored_as_specified(kind, mode, size):
    rng = np.random.default_rng(0)
    weights, salience = rng.random((2, 32)) / 32, rng.normal(size=(2, 32)) * 0.1
    config = DeltaConfig(
        threshold_mode=mode,
        level=0.5,
        block_size=size,
        window=size,
        key_format="deltas",
        key_bits=4,
        key_widths=(WIDTHS,),
        sensitivities=Sensitivities([weights], salience=[salience]),
    )
    keys = mx.array(smooth_keys((1, 2, 2 * size, 32))).astype(HALVES[kind])
    coding = deltas.LaneCoding.of(config, 2, 32)
    stored = deltas.store_deltas(keys, config, coding, 0)
    blocks = put_together(stored, coding, size)
    found = as_float(unpack(blocks, 2))
    np.testing.assert_array_equal(deltas.read_structure(blocks)[2], stored.counts)
    differing = 0
    for head, b in np.ndindex(2, 2):
        span, widths = slice(b * size, (b + 1) * size), np.array(list(map(int, WIDTHS[head])))
        wanted = ref.pack_block(
            as_float(keys[0, head, span]),
            weights[head].astype(np.float32),
            salience[head].astype(np.float32),
            0.5,
            mode == "optimal",
            config.sinks if b == 0 else 0,
            widths,
            kind,
        )
        count = int(stored.counts[0, head, b])
        own = ref.DeltaBlock(
            np.array(stored.words[0, head, b, :count]),
            np.array(stored.sequence[0, head, b]),
            as_float(stored.low[0, head, b]),
            np.array(stored.steps[0, head, b]),
        )
        # The same runs; on a GPU sums may be in another order, and round a few grids otherwise.
        np.testing.assert_array_equal(own.sequence, wanted.sequence)
        assert count == len(wanted.words)
        assert not stored.words[0, head, b, count:].any()
        np.testing.assert_allclose(own.low, wanted.low, atol=0.1)
        differing += (own.steps != wanted.steps).sum() + (own.words != wanted.words).sum()
        np.testing.assert_array_equal(
            found[0, head, span], ref.unpack_block(own, size, widths, kind)
        )
    assert differing <= np.array(stored.counts).sum() // 5
    assert not differing or mx.default_device() == mx.Device(mx.gpu)


def test_blocks_that_are_not_there_stay_in_bounds():
    """What is read of them is anything, but no word past the end, whatever is in the payload."""
    coding = deltas.LaneCoding.of(DeltaConfig(key_format="deltas", key_bits=7), 2, 64)
    nothing = mx.zeros((1, 2, 1, 64), mx.float16)
    blocks = deltas.DeltaBlocks(
        mx.full((1, 9), 0xFFFFFFFF, mx.uint32),
        mx.zeros((1, 2, 1), mx.int32),
        nothing,
        nothing.astype(mx.uint8),
        mx.broadcast_to(mx.arange(64, dtype=mx.uint8), (1, 2, 1, 64)),
        None,
        coding,
        64,
    )
    assert unpack(blocks, 1).shape == (1, 2, 64, 64)


def test_without_calibration_all_lanes_are_alike():
    coding = deltas.LaneCoding.of(DeltaConfig(key_format="deltas", key_bits=3.5), 2, 64)
    assert sorted(sum(coding.widths, ())) == [3] * 8 + [4] * 8
    assert coding.worst_words(64) == 1 + max(map(sum, coding.widths)) * 16
