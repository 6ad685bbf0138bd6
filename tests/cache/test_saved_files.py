"""Files that people saved with an earlier version load, and go on as they did."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.utils import load_model

import mlx_delta
from mlx_delta import BatchDeltaKVCache, DeltaConfig, DeltaKVCache
from mlx_delta.method.storage import round_to, whole_steps
from mlx_delta.method.values import encode_groups
from tests.fixtures import make

from .broken import header, replaced, setting

NAMES = [*make.SETTINGS, "batch_dense"]


@pytest.fixture(scope="module")
def model():
    model, _ = mlx_delta.load(make.HERE / "model")
    model.set_dtype(mx.float32)  # as it was where there is no GPU
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_cache_gives_the_logits_that_it_gave(name, model):
    caches, metadata = load_prompt_cache(str(make.HERE / f"{name}.safetensors"), True)
    assert metadata == {"made": "0.1.0"}
    batch = name.startswith("batch")
    assert {type(cache) for cache in caches} == {BatchDeltaKVCache if batch else DeltaKVCache}
    wanted = np.load(make.HERE / "logits.npz")
    for i, logits in enumerate(make.follow(model, caches, len(make.ROWS) if batch else 1)):
        np.testing.assert_allclose(logits, wanted[f"{name}_{i}"], atol=2e-5)


@pytest.mark.parametrize("name", make.SETTINGS)
def test_the_text_fed_today_gives_them_too(name, model):
    """So it is the same encoding that the file holds, and not only a file that can be read."""
    caches = make.caches_of(model, make.SETTINGS[name], make.LENGTH)
    wanted = np.load(make.HERE / "logits.npz")
    for i, logits in enumerate(make.follow(model, caches)):
        # A prompt's attention is summed up in another order now: a key or code may round otherwise.
        np.testing.assert_allclose(logits, wanted[f"{name}_{i}"], atol=4e-3)


@pytest.mark.filterwarnings("ignore:.*packed by an earlier version")
@pytest.mark.parametrize("name", make.OLD)
def test_an_old_form_is_read_bit_for_bit(name):
    caches = load_prompt_cache(str(make.HERE / f"{name}.safetensors"))
    wanted = np.load(make.HERE / "old_arrays.npz")
    for i, cache in enumerate(caches):
        assert cache.config.key_bits is cache.config.value_bits is None
        assert cache.full_from == ([0, 24] if name.startswith("batch") else [24])
        for what, found in zip(("keys", "values"), cache.keys_and_values(), strict=True):
            if f"{name}_{i}_{what}" in wanted:
                np.testing.assert_array_equal(found, wanted[f"{name}_{i}_{what}"])


@pytest.mark.parametrize(("name", "tolerance"), [("packed16", 5e-3), ("values8", 6e-2)])
def test_an_old_form_goes_on_in_full(name, tolerance, model):
    """What follows is not rounded any more as it was when the file was made."""
    with pytest.warns(UserWarning, match="were packed by an earlier version; they are in full"):
        caches = load_prompt_cache(str(make.HERE / f"{name}.safetensors"))
    wanted = np.load(make.HERE / "logits.npz")
    for i, logits in enumerate(make.follow(model, caches)):
        np.testing.assert_allclose(logits, wanted[f"{name}_{i}"], atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*packed by an earlier version")
def test_an_old_batch_goes_on_as_its_rows_do(model):
    batch = load_prompt_cache(str(make.HERE / "batch_packed4.safetensors"))
    rows = [[cache.extract(row) for cache in batch] for row in range(len(make.ROWS))]
    together = make.follow(model, batch, len(make.ROWS))
    for row, caches in enumerate(rows):
        for logits, whole in zip(make.follow(model, caches), together, strict=True):
            np.testing.assert_allclose(logits[0], whole[row], atol=2e-5)


# header, near, words of values, scales, biases, masks, payload, offsets, grid, sinks, zeros
@pytest.fixture(scope="module")
def old_state() -> list:
    """The state of the first layer, before anything reads it."""
    file = str(make.HERE / "packed4.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeltaKVCache, "from_state", classmethod(lambda _, state: state))
        return load_prompt_cache(file)[0]


@pytest.mark.filterwarnings("ignore:.*packed by an earlier version")
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: header(s, version=7), "version 7"),
        (lambda s: header(s, type="int4"), "int4"),
        (lambda s: header(s, firsts=[8, 8, 8]), "counts for different numbers of rows"),
        (lambda s: header(s, firsts=[40]), "near keys from 40 on"),
        (lambda s: header(s, firsts=[4]), "near keys from 4 on"),
        (lambda s: header(s, firsts=[-8]), "near keys from -8 on"),
        (lambda s: header(s, lengths=[9999]), "9999 tokens"),
        (lambda s: header(s, encoded=[2]), "2 encoded blocks"),
        (lambda s: header(s, encoded=[99]), "99 encoded blocks"),
        (lambda s: header(s, lost=[10]), "it counts 45 tokens"),
        (lambda s: header(s, lost=[0]), "it counts 45 tokens"),
        (lambda s: header(s, config=4), "its setting is no object"),
        (lambda s: setting(s, key_bits=16), "grid do not fit"),
        (lambda s: setting(s, key_bits=5), "11 parts"),
        (lambda s: setting(s, value_bits=8), "not 8-bit codes"),
        (lambda s: setting(s, value_bits=16), "11 parts"),
        (lambda s: setting(s, window=16), "near keys do not fit"),
        (lambda s: setting(s, block_size=4), "near keys do not fit"),
        (lambda s: setting(s, sinks=3), "sinks do not fit"),
        (lambda s: s[:-2], "9 parts"),
        (lambda s: replaced(s, 6, s[6][:, :50]), "offsets of row 0 do not fit"),
        (lambda s: replaced(s, 6, s[6][0]), "payload do not fit"),
        (lambda s: replaced(s, 7, s[7] + 10**6), "offsets of row 0 do not fit"),
        (lambda s: replaced(s, 7, s[7] - 10**6), "offsets of row 0 do not fit"),
        (lambda s: replaced(s, 7, s[7][0, 0]), "lacks one of its buffers"),
        (lambda s: replaced(s, 5, s[5][..., :0]), "masks do not fit"),
        (lambda s: replaced(s, 5, None), "lacks one of its buffers"),
        (lambda s: replaced(s, 8, None), "grid do not fit"),
        (lambda s: replaced(s, 9, s[9][:, :, :1]), "sinks do not fit"),
        (lambda s: replaced(s, 1, s[1][:, :, :8]), "near keys do not fit"),
        (lambda s: replaced(s, 1, s[1].astype(mx.float32)), "near keys do not fit"),
        (lambda s: replaced(s, 1, s[1][:, :, :0]), "lacks one of its buffers"),
        (lambda s: replaced(s, 2, s[2][..., :0]), "lacks one of its buffers"),
        (lambda s: replaced(s, 3, s[3][..., :0]), "lacks one of its buffers"),
        (lambda s: replaced(s, 3, s[3].astype(mx.uint32)), "not 4-bit codes"),
        (lambda s: replaced(s, 4, s[4][:, :, :1]), "not 4-bit codes"),
        (lambda s: replaced(s, 10, s[10].astype(mx.uint32)), "zeros do not fit"),
    ],
)
def test_a_damaged_old_state_is_refused(break_it, message, old_state):
    with pytest.raises(ValueError, match=message):
        DeltaKVCache.from_state(break_it(old_state))


@pytest.mark.filterwarnings("ignore:.*packed by an earlier version")
def test_an_old_state_from_before_it_was_filled(old_state):
    text = json.dumps({**json.loads(old_state[0]), "lengths": [0], "encoded": [0], "model": None})
    cache = DeltaKVCache.from_state([text, *[None] * 10])
    assert cache.empty() and cache.config.key_bits is None


@pytest.mark.filterwarnings("ignore:.*packed by an earlier version")
@pytest.mark.parametrize(
    "text", ["key_format=codes,key_bits=4", "level=0.03,key_bits=4"], ids=["codes", "deltas"]
)
def test_quantized_values_beside_coded_keys(model, text):
    config = DeltaConfig.parse(text, make.SETTING)
    caches = make.caches_of(model, config, make.LENGTH)
    name, near, values, *others = caches[0].state
    words = mx.quantize(values.astype(mx.float16), 32, 8)  # as they were stored
    fields = json.loads(name)
    state = [json.dumps({**fields, "config": {**fields["config"], "value_bits": 8}})]
    found = DeltaKVCache.from_state([*state, near, *words, *others])
    assert found.config == caches[0].config
    keys, read = found.keys_and_values()
    np.testing.assert_array_equal(keys, caches[0].keys_and_values()[0])
    wanted = mx.dequantize(words[0], *(x.astype(values.dtype) for x in words[1:]), 32, 8)
    np.testing.assert_array_equal(read, wanted[:, :, : make.LENGTH])
    empty = {**json.loads(state[0]), "lengths": [0], "encoded": [0], "model": None}
    nothing = [None] * (len(others) + 4)
    assert DeltaKVCache.from_state([json.dumps(empty), *nothing]).empty()


def test_mlx_lm_runs_the_converted_directory_by_the_file_in_it(model):
    through_shim, config = load_model(make.HERE / "model", trust_remote_code=True)
    assert config["delta"]["block_size"] == 8
    text = make.tokens(40)
    through_shim.set_dtype(mx.float32)
    np.testing.assert_allclose(through_shim(text), model(text), atol=2e-5)


# header, near, words of values, scales, biases, near values, their sinks, words, grid, sinks
@pytest.fixture(scope="module")
def affine_state() -> list:
    """The state of the first layer of a cache with affine values, before anything reads it."""
    file = str(make.HERE / "affine_values.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeltaKVCache, "from_state", classmethod(lambda _, state: state))
        return load_prompt_cache(file)[0]


def test_affine_values_are_coded_anew(model, affine_state):
    """As if what the old codes stood for had come as values; so logits are about what they were."""
    with pytest.warns(UserWarning, match="values were coded by an earlier version; they are coded"):
        caches = load_prompt_cache(str(make.HERE / "affine_values.safetensors"))
    assert caches[0].config == make.AFFINE
    words, *grid = affine_state[2:5]
    before = mx.dequantize(words, *(x.astype(mx.float32) for x in grid), 32, 3)[0, 0]
    codes, scales = encode_groups(round_to(np.array(before), "float16"), 3)
    found = caches[0].state[2:4]
    np.testing.assert_array_equal(found[1][0, 0, :, 0], scales)
    units = whole_steps(scales)[:, None]
    after = mx.dequantize(found[0][0, 0], mx.array(units), mx.array(units * -3.5), 32, 3)
    np.testing.assert_array_equal(after, units * (codes - 3.5))
    assert scales.any()
    wanted = np.load(make.HERE / "logits.npz")
    for i, logits in enumerate(make.follow(model, caches)):
        alike = np.corrcoef(logits.ravel(), wanted[f"affine_values_{i}"].ravel())[0, 1]
        assert alike > 0.9, "as of a text with full values: .97"


def test_lanes_whose_tokens_came_in_order_read_as_they_were(model):
    caches = load_prompt_cache(str(make.HERE / "lanes_in_order.safetensors"))
    assert caches[0].config == make.LANES
    (done,) = caches[0].encoded
    sequences = np.array(caches[0].state[-2])[0, :, :done]
    assert done
    np.testing.assert_array_equal(sequences, np.broadcast_to(np.arange(8), sequences.shape))
    wanted = np.load(make.HERE / "logits.npz")
    logits = make.follow(model, caches)
    first = -make.LENGTH % 8  # token with which a block becomes far, and is held as it is now
    np.testing.assert_allclose(
        logits[0][:, :first], wanted["lanes_in_order_0"][:, :first], atol=2e-3
    )


@pytest.mark.filterwarnings("ignore:.*coded by an earlier version")
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: replaced(s, 3, s[3].astype(mx.uint8)), "saved values do not fit"),
        (lambda s: replaced(s, 4, s[4][..., :0]), "saved values do not fit"),
        (lambda s: replaced(s, 2, s[2][:, :, :5]), "saved values do not fit"),
        (lambda s: replaced(s, 3, None), "lacks one of its buffers"),
        (lambda s: setting(s, value_bits=4), "saved values do not fit"),
        (lambda s: [*s, s[1]], "11 parts"),
    ],
)
def test_a_damaged_state_of_affine_values_is_refused(break_it, message, affine_state):
    with pytest.raises(ValueError, match=message):
        DeltaKVCache.from_state(break_it(affine_state))


def test_an_affine_state_from_before_it_was_filled(affine_state):
    fields = {**json.loads(affine_state[0]), "lengths": [0], "encoded": [0], "model": None}
    assert DeltaKVCache.from_state([json.dumps(fields), *[None] * 9]).empty()
