"""Settings by name: what they parse to, what their caches see, and what they take."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.cache.window_only import WindowOnlyCache
from mlx_delta.measure.settings import cache_nbytes, parse_setting, parse_settings
from mlx_delta.sensitivities import Sensitivities
from tests.tiny import SMALL, llama_model

IDS = np.random.default_rng(5).integers(0, 4096, 100).tolist()
HEAD_64 = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("delta", {}),
        ("delta:threshold=1.25", {"threshold": 1.25}),
        ("delta:threshold=1/2.5/0", {"threshold": (1, 2.5, 0)}),
        ("delta:threshold=0.5,threshold_mode=absolute", {"threshold_mode": "absolute"}),
        ("delta:window=0,sinks=0,level=1,key_bits=4,value_bits=8", {"window": 0, "value_bits": 8}),
        ("delta:key_bits=none,keyframes=true", {"key_bits": None, "keyframes": True}),
        ("window-only:window=32", {"window": 32}),
    ],
)
def test_options_change_the_models_own_setting(name, changes):
    delta = parse_setting(name, SMALL).delta
    assert delta.block_size == SMALL.block_size
    assert {key: getattr(delta, key) for key in changes} == changes


def test_the_papers_preset_does_not_start_from_the_models_setting():
    assert parse_setting("paper", SMALL).delta == DeltaConfig.paper()
    assert parse_setting("paper:threshold=0.3", SMALL).delta == DeltaConfig.paper(0.3)


def test_a_share_of_zeros_or_a_loss_stands_for_the_level_of_the_curve():
    curve = [(0.0, 0.0, 0.0), (0.001, 0.5, 1e-4), (0.002, 0.7, 4e-4), (0.004, 0.8, 9e-4)]
    own = DeltaConfig(sensitivities=Sensitivities([np.ones((2, 16))] * 3, curve))
    assert parse_setting("delta:sparsity=0.7", own).delta.level == 0.002
    assert parse_setting("delta:kl=0.0009,sinks=7", own).delta == own.changed(level=0.004, sinks=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "detla",
            r"unknown setting 'detla' \(did you mean delta or dense\?\); known are dense, delta",
        ),
        ("kv16", r"unknown setting 'kv16' \(did you mean kv"),
        ("delta:", "'delta:' has nothing after its colon"),
        ("kv8:bits=4", "'kv8' takes no options but got 'bits=4'"),
        ("rotating", "'rotating': give the tokens to keep, more than 4"),
        ("rotating:4", "'rotating:4': give the tokens to keep, more than 4"),
        ("rotating:-9", "give the tokens to keep"),
        ("delta:treshold=1", r"unknown option 'treshold' \(did you mean threshold"),
        ("delta:threshold", "threshold lacks a value, as in threshold=1"),
        ("delta:threshold=-1", r"in 'delta:threshold=-1': \[DeltaConfig\] threshold must be >= 0"),
        ("delta:threshold=high", "threshold must be a number but got 'high'"),
        ("delta:key_bits=9", "key_bits must be between 2 and 8"),
        ("paper:key_bits=4", "key_bits=4 needs keyframes=True"),
    ],
)
def test_a_wrong_name_or_option_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_setting(name, SMALL)


def test_the_same_setting_twice_is_refused():
    with pytest.raises(ValueError, match="'kv8' is given twice"):
        parse_settings(["kv8", "dense", "kv8"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("delta:kv=small,key_bits=4", "kv=small and key_bits both give key_bits; drop one"),
        ("delta:kv=small,kv=exact", "kv is given twice"),
        ("delta:kv=small,sparsity=0.5", "sparsity says how much is held, but of keys with"),
        ("delta:level=0.1,sparsity=0.5", "sparsity and level=0.1 both set the level; drop one"),
    ],
)
def test_what_contradicts_itself_is_refused(name, message):
    with pytest.raises(ValueError, match=f"in '{name}': .*{message}"):
        parse_setting(name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dense", KVCache), ("kv8", KVCache), ("rotating:40", RotatingKVCache)]
    + [("delta", DeltaKVCache), ("window-only", WindowOnlyCache), ("paper", DeltaKVCache)],
)
def test_each_layer_gets_a_cache_of_the_settings_kind(name, kind):
    caches = parse_setting(name, SMALL).make_caches(llama_model(), 100)
    assert [type(cache) for cache in caches] == [kind] * 3


def test_the_papers_window_is_measured_on_the_prompt():
    caches = parse_setting("paper").make_caches(llama_model(), 200)
    assert caches[0].config.block_size == 10 and caches[0].config.block_fraction is None


def test_layers_get_their_own_thresholds():
    setting = parse_setting("delta:threshold=0.1/0.2/0.3", SMALL)
    caches = setting.make_caches(llama_model())
    assert [cache.config.threshold for cache in caches] == [0.1, 0.2, 0.3]


def test_a_short_name_stands_for_fields_and_others_may_follow():
    caches = parse_setting("delta:kv=balanced,sinks=2", SMALL).make_caches(llama_model())
    config = caches[0].config
    assert (config.key_format, config.value_format, config.sinks) == ("codes", "rotated", 2)
    assert parse_setting("delta:kv=exact", SMALL).delta.key_bits is None
    with pytest.raises(ValueError, match="unknown kind 'tiny'; known are small, balanced, exact"):
        parse_setting("delta:kv=tiny", SMALL)


def test_sliding_layers_keep_mlx_lms_cache_whatever_the_setting():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = llama_model(layer_types=types, sliding_window=24)
    for name in ("dense", "delta", "kv4"):
        caches = parse_setting(name, SMALL).make_caches(model)
        assert [type(c) is RotatingKVCache for c in caches] == [True, False, True]
        assert caches[0].max_size == 24


@pytest.mark.parametrize("name", ["dense", "delta", "window-only", "rotating:40"])
@pytest.mark.parametrize("step", [1, 7, 64])
def test_how_a_text_is_cut_changes_nothing(name, step):
    model, setting = llama_model(), parse_setting(name, SMALL)
    caches = setting.make_caches(model, 30)
    setting.prefill(model, IDS[:30], caches)
    cut = [setting.forward(model, IDS[i : i + step], caches) for i in range(30, 100, step)]
    caches = setting.make_caches(model, 30)
    setting.prefill(model, IDS[:30], caches)
    single = [setting.forward(model, [token], caches) for token in IDS[30:]]
    assert mx.allclose(mx.concatenate(cut), mx.concatenate(single), atol=1e-4)


@pytest.mark.parametrize("step", [5, 2048])
def test_prefill_gives_the_last_tokens_logits(step):
    model, setting = llama_model(delta=None), parse_setting("dense")
    caches = setting.make_caches(model)
    last = setting.prefill(model, IDS, caches, step)
    assert mx.allclose(last, model(mx.array(IDS)[None])[0, -1], atol=1e-4)
    assert caches[0].offset == 100


def test_prefill_of_nothing_is_refused():
    model, setting = llama_model(), parse_setting("dense")
    with pytest.raises(ValueError, match=r"\[prefill\] the prompt is empty"):
        setting.prefill(model, [], setting.make_caches(model))


def test_a_quantized_cache_is_dense_in_the_prompt_and_quantized_after_it():
    model, setting = llama_model(**HEAD_64), parse_setting("kv4")
    caches = setting.make_caches(model)
    first = setting.forward(model, IDS[:50], caches)
    assert mx.allclose(first, model(mx.array(IDS[:50])[None], [KVCache() for _ in caches])[0])
    assert all(type(cache) is QuantizedKVCache and cache.bits == 4 for cache in caches)
    dense = model(mx.array(IDS)[None], [KVCache() for _ in caches])[0, 50:]
    assert not mx.allclose(setting.forward(model, IDS[50:], caches), dense, atol=1e-3)


def test_window_only_sees_what_the_delta_sees_exactly_and_no_more():
    model, setting = llama_model(), parse_setting("window-only", SMALL)
    logits = setting.forward(model, IDS, setting.make_caches(model))
    query, key = np.arange(100)[:, None], np.arange(100)[None]
    near = (key // 8 >= query // 8 - 2) | (key < 3)
    mask = mx.array(near & (key <= query))
    x = model.model.embed_tokens(mx.array(IDS)[None])
    for layer in model.model.layers:
        x = layer(x, mask, KVCache())
    expected = model.model.embed_tokens.as_linear(model.model.norm(x))[0]
    assert mx.allclose(logits, expected, atol=1e-3)


def test_window_only_sees_no_more_in_a_batch():
    model, setting = llama_model(), parse_setting("window-only", SMALL)
    rows = []
    for length in (90, 37, 5):
        caches = setting.make_caches(model)
        setting.forward(model, IDS[:length], caches)
        rows.append(caches)
    merged = [WindowOnlyCache.merge(list(layer)) for layer in zip(*rows, strict=True)]
    new = mx.array(IDS[60:69]).reshape(3, 3)
    together = model(new, merged)
    for row, caches in enumerate(rows):
        alone = setting.forward(model, new[row].tolist(), caches)
        np.testing.assert_allclose(together[row], alone, atol=1e-4)
        after = [cache.extract(row).compact() for cache in merged]
        assert all(type(cache) is WindowOnlyCache for cache in after)
        expected = setting.forward(model, [7], caches)
        np.testing.assert_allclose(setting.forward(model, [7], after), expected, atol=1e-4)


# Bytes.


@pytest.mark.parametrize(
    "name",
    ["dense", "delta", "delta:level=1,key_bits=4,value_bits=4", "delta:kv=small", "kv8", "kv4"],
)
def test_bytes_of_a_16_bit_model_are_what_its_caches_say(name):
    model = llama_model(**HEAD_64)
    model.set_dtype(mx.float16)
    setting = parse_setting(name, SMALL)
    caches = setting.make_caches(model)
    setting.prefill(model, IDS, caches)
    assert cache_nbytes(caches) == sum(cache.nbytes for cache in caches) > 0


def test_bytes_do_not_depend_on_the_type_a_model_runs_in():
    sizes = []
    for dtype in (mx.float32, mx.bfloat16):
        model = llama_model(**HEAD_64)
        model.set_dtype(dtype)
        for name in (
            "dense",
            "delta:key_format=codes,key_bits=4,value_bits=4",
            "kv8",
            "rotating:40",
        ):
            setting = parse_setting(name, dataclasses.replace(SMALL, sinks=0))
            caches = setting.make_caches(model)
            setting.prefill(model, IDS, caches)
            sizes.append(cache_nbytes(caches))
    # Rounded to another type, a few more values happen to be equal and are held.
    assert sizes[:4] == pytest.approx(sizes[4:], rel=1e-3)


def test_window_only_counts_what_it_would_keep():
    model, setting = llama_model(), parse_setting("window-only", SMALL)
    caches = setting.make_caches(model)
    setting.prefill(model, IDS, caches)
    dense = 3 * 256 * 2 * (16 + 16) * 2  # layers, tokens of a buffer, kv heads, K and V, bytes
    kept = 3 + 16 + 8  # sinks, window, block
    assert cache_nbytes(caches) == pytest.approx(dense * kept / 256, rel=0.05)


def test_stock_is_dense_by_mlxs_own_attention(monkeypatch):
    model = llama_model()
    stock, dense = parse_settings(["stock", "dense"])
    expected = dense.prefill(model, IDS, dense.make_caches(model))
    monkeypatch.setattr("mlx_delta.attention.dense.exact_attention", None)
    found = stock.prefill(model, IDS, stock.make_caches(model))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert cache_nbytes(stock.make_caches(model)) == 0


def test_tiles_know_where_the_prompt_ends():
    model = llama_model()
    setting = parse_setting("delta:threshold=0,block_size=64,window=64,tiles=0.5", SMALL)
    assert {cache.prompt_length for cache in setting.make_caches(model, 700)} == {700}
