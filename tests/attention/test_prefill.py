"""Prefill by blocks and by tiles, as a model's cache meets it."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.generate.command import main
from mlx_delta.measure.sparsity import measure_density
from mlx_delta.method import attention as reference
from mlx_delta.method.tiles import EXACT_BEGIN, EXACT_END
from tests.tiny import llama_model, smooth_keys, tokens

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 16, 0.25
EXACT = {
    "relative": DeltaConfig(threshold=0.7),
    "no window": DeltaConfig(threshold=0.7, window=0),
    "wide window": DeltaConfig(threshold=0.7, window=192),
    "blocks of 32": DeltaConfig(threshold=0.7, block_size=32, window=64),
    "blocks of 50": DeltaConfig(threshold=0.7, block_size=50, window=50),
    "deltas": DeltaConfig(key_bits=7, value_bits=16),
}


def inputs(length: int, rows: int = 1) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of a text."""
    rng = np.random.default_rng(length)
    shapes = (rows, HEADS, length, DIM), (rows, KV_HEADS, length, DIM)
    queries, values = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return mx.array(queries), mx.array(smooth_keys(shapes[1], length)), mx.array(values)


def attend(cache, text, cuts, mask=None) -> np.ndarray:
    """Feed a text chunk by chunk; the outputs of all its queries."""
    outputs, start = [], 0
    for steps in cuts:
        part = [x[:, :, start : start + steps] for x in text]
        outputs.append(delta_attention(*part, cache, SCALE, mask))
        mx.eval(outputs[-1], cache.keys_and_values())
        start += steps
    return np.array(mx.concatenate(outputs, axis=2))


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("cuts", [[500], [64, 200, 1, 235]], ids=str)
def test_long_chunks_are_as_token_by_token(config, cuts):
    """A token alone is attended to by MLX's own attention, without blocks."""
    text = inputs(500)
    found = attend(DeltaKVCache(config), text, cuts)
    expected = attend(DeltaKVCache(config), text, [1] * 500)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_long_chunks_agree_with_the_specification():
    config = EXACT["relative"]
    text = inputs(300)
    found = attend(DeltaKVCache(config), text, [300])
    for head in range(HEADS):
        own = [
            np.array(x[0, head // (1 if i == 0 else HEADS // KV_HEADS)]) for i, x in enumerate(text)
        ]
        expected = reference.hybrid_attention(*own, config, SCALE)
        np.testing.assert_allclose(found[0, head], expected, atol=1e-5)


TILES = DeltaConfig(threshold=0.0, prefill="tiles", tiles=0.6)


@pytest.mark.parametrize(
    "config", [TILES, DeltaConfig(prefill="tiles", tiles=0.6)], ids=["full keys", "held keys"]
)
def test_tiles_do_not_depend_on_the_cuts(config, tiles_from_the_start):
    text = inputs(640 + 30)
    cache = DeltaKVCache(config)
    whole = attend(cache, text, [670])
    assert 0 < cache.tile_count.computed < cache.tile_count.all
    assert measure_density([cache, KVCache()]) == cache.tile_count.density
    for cuts in ([64] * 10 + [30], [320, 350], [192, 448, 30]):
        again = DeltaKVCache(config)
        np.testing.assert_allclose(attend(again, text, cuts), whole, atol=1e-5)
        assert again.tile_count == cache.tile_count


def test_tiles_skip_something_and_neither_at_the_beginning_nor_at_the_end_of_a_prompt():
    text = inputs(1536)
    exact = attend(DeltaKVCache(DeltaConfig(threshold=0.0)), text, [1536])
    cache = DeltaKVCache(TILES)
    cache.prompt_length = 1536
    found = attend(cache, text, [1536])
    np.testing.assert_allclose(found[:, :, -EXACT_END:], exact[:, :, -EXACT_END:], atol=1e-5)
    np.testing.assert_allclose(found[:, :, :EXACT_BEGIN], exact[:, :, :EXACT_BEGIN], atol=1e-5)
    between = np.abs(found - exact)[:, :, EXACT_BEGIN:-EXACT_END].max(axis=(0, 1, 3))
    assert (between > 1e-3).mean() > 0.5


def test_a_mask_or_rows_that_differ_have_all_tiles_computed():
    text = inputs(400)
    exact = attend(DeltaKVCache(DeltaConfig(threshold=0.0)), text, [400])
    mask = mx.arange(400) <= mx.arange(400)[:, None]
    cache = DeltaKVCache(TILES)
    np.testing.assert_allclose(attend(cache, text, [400], mask), exact, atol=1e-5)
    assert cache.tile_count.all == 0 and measure_density([cache]) is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prefill": "fast"}, "prefill must be 'exact' or 'tiles' but got 'fast'"),
        ({"prefill": "tiles", "tiles": 1.5}, r"tiles must be in \[0, 1\] but got 1.5"),
        ({"prefill": "tiles", "tiles": True}, r"tiles must be in \[0, 1\] but got True"),
        ({"prefill": "tiles", "tiles": (0.5, 2)}, r"tiles must be in \[0, 1\] but got 2"),
        ({"prefill": "tiles", "tiles": ()}, "tiles must not be an empty list"),
        ({"prefill": "tiles", "block_size": 48, "window": 48}, "block_size of 32, 64, 128 but got"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig(**fields)


def test_each_layer_takes_its_own_share():
    config = DeltaConfig.parse("tiles=0.7/0.9")
    assert config == DeltaConfig(prefill="tiles", tiles=(0.7, 0.9))
    assert [config.for_layer(i, 2).tile_share for i in range(2)] == [0.7, 0.9]
    assert DeltaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert str(config) == "prefill=tiles,tiles=0.7/0.9"
    with pytest.raises(ValueError, match="tiles has 2 values but the model has 3 layers"):
        config.for_layer(0, 3)
    with pytest.raises(ValueError, match="tiles per layer: call for_layer first"):
        _ = config.tile_share
    both = DeltaConfig(threshold=((0.5, 0.6), 1.0), prefill="tiles", tiles=(0.7, 0.9))
    assert both.for_layer(0, 2) == DeltaConfig(threshold=((0.5, 0.6),), prefill="tiles", tiles=0.7)


def test_the_same_tokens_however_a_prompt_is_cut(tiles_from_the_start):
    model = llama_model(DeltaConfig(threshold=0.0, prefill="tiles", tiles=0.5))
    prompt, found = tokens(1000)[0], []
    for step in (64, 320, 2048):
        caches = model.make_cache(prompt_length=1000)
        steps = generate_step(
            prompt, model, max_tokens=8, prompt_cache=caches, prefill_step_size=step
        )
        found.append(([token for token, _ in steps], [cache.tile_count for cache in caches]))
    assert found[0] == found[1] == found[2]
    assert all(0 < count.computed < count.all for count in found[0][1])


def test_the_setting_is_written_only_where_it_is_not_the_default():
    assert not {"prefill", "tiles"} & set(DeltaConfig().to_dict())
    assert DeltaConfig.from_dict(TILES.to_dict()) == TILES


def test_a_share_alone_asks_for_tiles():
    assert DeltaConfig().changed(tiles=0.7) == DeltaConfig(prefill="tiles", tiles=0.7)


def test_generation_by_tiles_reports_its_density(capsys, tiles_from_the_start):
    prompt = " ".join(["the moor lay quiet, and nobody came."] * 80)
    flags = ["--prompt", prompt, "--max-tokens", "2", "--json", "--tiles", "0.3"]
    assert main([*flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["delta"]["prefill"] == "tiles" and report["delta"]["tiles"] == 0.3
    assert report["prompt_tokens"] > EXACT_END + 5 * 64
    assert 0 < report["tile_density"] < 1
