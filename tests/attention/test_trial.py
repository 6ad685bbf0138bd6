"""On the text made up for a trial every mistake of attention shows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention import prefill
from mlx_delta.attention.operations import attend_in_full
from mlx_delta.attention.trial import kind_of_text, made_up
from mlx_delta.ops import tiles
from mlx_delta.ops.exact_attention import Far, exact_attention
from mlx_delta.ops.proving import ROOM
from mlx_delta.ops.tiles import TileCount, tile_attention
from tests.attention.test_costs import LAYERS, far_format
from tests.tiny import smooth_keys

SETTINGS = {
    "codes": far_format("codes"),
    "deltas": far_format("deltas", level=0.1),
    "many sinks": far_format("codes", sinks=200),
    "no sinks": far_format("deltas", level=0.1, sinks=0),
    "wide window": far_format("codes", window=256),
    "bounded": far_format("codes", max_size=320),
}
SCALE = 0.125


def asked(setting: DeltaConfig, dtype: mx.Dtype = mx.float16):
    cache = DeltaKVCache(setting.for_layer(0, LAYERS))
    keys = mx.array(smooth_keys((1, 2, 700, 64))).astype(dtype)
    queries = mx.repeat(keys[:, :, -1:], 3, axis=1)
    (part,) = cache.updates(keys, keys)[-1:]
    return queries, part.step


def mistakes(step) -> dict[str, mx.array]:
    """What keys [.., S] a query sees, if something is amiss."""
    token = mx.arange(step.length)
    size, far = step.block_size, step.encoded[0] * step.block_size
    return {
        "no far keys": token >= far,
        "no near keys": token < far,
        "the newest token": token < step.length - 1,
        "the first token": token > 0,
        "a far block": (token < far - size) | (token >= far),
        "a near block": (token < far) | (token >= far + size),
        "odd tokens": token % 2 == 0,
    }


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_part_of_the_text_counts(setting):
    queries, step = made_up(*asked(setting), SCALE, 1)
    assert step.length < 1000 and step.encoded[0] >= 3
    right = attend_in_full(queries, step, SCALE, None)
    for name, seen in mistakes(step).items():
        wrong = attend_in_full(queries, step, SCALE, seen[None])
        assert apart(wrong, right) > 1.4 * ROOM, name
    for factor in (0.8, 1.25):
        assert apart(attend_in_full(queries, step, SCALE * factor, None), right) > 1.4 * ROOM


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rounding_takes_a_small_part_of_the_room(dtype):
    queries, step = made_up(*asked(SETTINGS["codes"], dtype), SCALE, 1)
    right = attend_in_full(queries, step, SCALE, None)
    exact = attend_in_full(queries.astype(mx.float32) * 1.002, step, SCALE, None)
    assert queries.dtype == dtype and apart(exact, right) < ROOM / 3


def test_blocks_of_queries_end_at_a_blocks_end():
    queries, step = made_up(*asked(SETTINGS["codes"]), SCALE, 64)
    assert queries.shape == (2, 6, 64, 64) and step.starts[0] % 64 == 0 and step.steps == 64


def test_the_text_at_hand_is_not_looked_at():
    queries, step = asked(SETTINGS["codes"])
    one, two = made_up(queries, step, SCALE, 1), made_up(queries * mx.nan, step, SCALE, 1)
    assert mx.array_equal(one[0], two[0]) and mx.array_equal(one[1].held, two[1].held)
    assert kind_of_text(queries, step) == (mx.float16, 6, 2, 64, 64, 64)


def apart(found: mx.array, right: mx.array) -> float:
    a, b = (np.array(x.astype(mx.float32)) for x in (found, right))
    return float(np.sqrt(np.square(a - b).mean() / np.square(b).mean()))


def test_of_tiles_some_are_chosen_and_others_would_show():
    setting = DeltaConfig(threshold=0.5, prefill="tiles")
    queries, step = made_up(*asked(setting), SCALE, 64, prefill.MANY)
    text = step.full, step.values, SCALE, step.starts[0]
    far = Far(step.held, 64, 1)
    count = TileCount()
    right = tile_attention(queries, *text, far, prefill.SOME, count)
    assert 0.2 < count.density < 0.9
    exact = exact_attention(queries, *text, far=far)
    assert apart(right, exact) > 1.4 * ROOM, "were all computed"
    packed = tiles.pack_tiles
    reverse = lambda keys: packed(keys[:, :, ::-1])  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "pack_tiles", reverse)
        wrong = tile_attention(queries, *text, far, prefill.SOME, TileCount())
    assert apart(wrong, right) > 1.4 * ROOM


def test_one_head_leans_to_both_ends():
    queries, step = asked(SETTINGS["codes"])
    queries, step = made_up(queries[:, :2], step, SCALE, 1)
    right = attend_in_full(queries, step, SCALE, None)
    wrong = attend_in_full(queries, step, SCALE, (mx.arange(step.length) > 0)[None])
    assert apart(wrong, right) > 1.4 * ROOM
