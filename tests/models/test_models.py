"""The models: dense they are mlx-lm's to the bit, with the delta every way in agrees."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.qwen3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import llama as stock_llama
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_delta import DeltaConfig, DeltaKVCache, measure_sparsity
from mlx_delta.method import attention as reference
from mlx_delta.models import get_model_classes
from mlx_delta.models.common import normalize_rope
from mlx_delta.ops.exact_attention import LEAST_QUERIES
from tests.tiny import LLAMA, SMALL, llama_model, tokens

VARIANTS = {
    "plain": {},
    "llama 3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "traditional rope": {"rope_traditional": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied head": {"tie_word_embeddings": False},
    "sliding layers": {
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def stock(model, changes) -> stock_llama.Model:
    """mlx-lm's own Llama with the same weights."""
    twin = stock_llama.Model(stock_llama.ModelArgs.from_dict({**LLAMA, **changes}))
    twin.load_weights(tree_flatten(model.parameters()))
    twin.eval()
    return twin


@each_variant
def test_delta_off_is_mlx_lm_to_the_bit(changes):
    model, ids = llama_model(None, **changes), tokens(2 * LEAST_QUERIES)
    twin = stock(model, changes)
    few = LEAST_QUERIES - 1  # for more, a machine without a GPU has attention of its own
    assert mx.array_equal(model(ids[:, :few]), twin(ids[:, :few]))
    ours, theirs = make_prompt_cache(model), make_prompt_cache(twin)
    assert [type(c) for c in ours] == [type(c) for c in theirs]
    for part in (ids[:, :few], ids[:, few : 2 * few], ids[:, 2 * few : -1], ids[:, -1:]):
        assert mx.array_equal(model(part, cache=ours), twin(part, cache=theirs))


@each_variant
@pytest.mark.parametrize("cuts", [[200], [130, 69, 1], [20, 100, 80]], ids=str)
def test_delta_off_is_mlx_lm_on_long_prompts(changes, cuts):
    model, ids = llama_model(None, **changes), tokens(200)
    twin = stock(model, changes)
    ours, theirs, start = make_prompt_cache(model), make_prompt_cache(twin), 0
    for steps in cuts:
        part = ids[:, start : start + steps]
        output, expected = model(part, cache=ours), twin(part, cache=theirs)
        np.testing.assert_allclose(output, expected, atol=5e-4)
        start += steps


@each_variant
def test_a_window_longer_than_the_text_is_mlx_lm_to_the_bit(changes):
    model, ids = llama_model(DeltaConfig(block_size=8, window=80), **changes), tokens(70)
    twin = stock(model, changes)
    assert mx.array_equal(model(ids, cache=model.make_cache()), twin(ids, cache=twin.make_cache()))


@each_variant
def test_threshold_zero_is_mlx_lm_to_rounding(changes):
    zero = DeltaConfig(**{**SMALL.to_dict(), "threshold": 0.0})
    model, ids = llama_model(zero, **changes), tokens(200)
    twin = stock(model, changes)
    np.testing.assert_allclose(
        model(ids, cache=model.make_cache()), twin(ids, cache=twin.make_cache()), atol=2e-3
    )


@each_variant
@pytest.mark.parametrize("cuts", [[199, 1], [1] * 60 + [140], [64, 136], [50, 50, 100]], ids=str)
def test_chunks_give_the_same_logits(changes, cuts):
    model, ids = llama_model(**changes), tokens(200)
    whole = model(ids, cache=model.make_cache())
    caches, outputs, start = model.make_cache(), [], 0
    for steps in cuts:
        outputs.append(model(ids[:, start : start + steps], cache=caches))
        start += steps
    np.testing.assert_allclose(mx.concatenate(outputs, axis=1), whole, atol=2e-3)
    if "sliding_window" not in changes:
        assert not np.allclose(whole, stock(model, changes)(ids), atol=0.1), "the delta does act"


@each_variant
@given(
    lengths=st.lists(st.integers(1, 90), min_size=2, max_size=3),
    chunk=st.sampled_from([7, 64, 200]),
)
@settings(deadline=None, max_examples=5)
def test_a_right_padded_batch_gives_each_row_its_own_logits(changes, lengths, chunk):
    """As mlx-lm's batch generation feeds it: padded prompts in chunks, then one token each."""
    model, longest = llama_model(**changes), max(lengths)
    rows = [tokens(n + 1, seed=n)[0] for n in lengths]
    padding = [longest - n for n in lengths]
    caches = [c.merge([c] * len(rows)) for c in model.make_cache()]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=padding)
    padded = mx.stack([mx.pad(r[:-1], (0, p)) for r, p in zip(rows, padding, strict=True)])
    outputs = []
    cuts = [*range(0, longest, chunk), longest]
    if "sliding_window" in changes and longest % chunk == 1 and len(cuts) > 2:
        del cuts[-2]  # mlx-lm's own rotating cache takes no single token of a padded prompt
    for start, end in itertools.pairwise(cuts):
        outputs.append(model(padded[:, start:end], cache=caches))
        mx.eval([c.state for c in caches])
    prefill = mx.concatenate(outputs, axis=1)
    for cache in caches:
        cache.finalize()
    last = model(mx.stack([r[-1:] for r in rows]), cache=caches)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = model(row[None], cache=model.make_cache())[0]
        np.testing.assert_allclose(prefill[i, :length], alone[:-1], atol=2e-3)
        np.testing.assert_allclose(last[i, 0], alone[-1], atol=2e-3)


def test_without_a_cache_the_delta_still_acts():
    """Perplexity tools call the model so: they must not measure dense attention unawares."""
    model, ids = llama_model(), tokens(200)
    assert mx.array_equal(model(ids), model(ids, cache=model.make_cache()))
    assert not np.allclose(model(ids), llama_model(None)(ids), atol=0.1)


def test_a_dense_cache_makes_the_same_model_dense():
    model, ids = llama_model(), tokens(200)
    dense = model(ids, cache=[KVCache() for _ in model.layers])
    assert mx.array_equal(dense, llama_model(None)(ids))


def test_sliding_layers_keep_their_own_cache():
    model = llama_model(**VARIANTS["sliding layers"])
    assert [type(c) for c in model.make_cache()] == [RotatingKVCache, DeltaKVCache, RotatingKVCache]


def test_layers_take_their_own_thresholds():
    model = llama_model(DeltaConfig(**{**SMALL.to_dict(), "threshold": [0.0, 1.0, 4.0]}))
    caches = model.make_cache()
    model(tokens(200), cache=caches)
    heads = measure_sparsity(caches, 200).prefill_heads.mean(axis=1)
    assert heads[0] == 0 < heads[1] < heads[2]


def test_sparsity_is_what_the_keys_say():
    model = llama_model(DeltaConfig(threshold=1.0))
    caches = model.make_cache()
    model(tokens(300), cache=caches)
    dense = [KVCache()] + model.make_cache()[1:]
    model(tokens(300), cache=dense)
    keys = np.array(dense[0].keys_and_values()[0][0])
    wanted = [reference.sparsity(head, DeltaConfig(threshold=1.0), 0, 300) for head in keys]
    measured = measure_sparsity(caches, 300)
    np.testing.assert_allclose(measured.prefill_heads[0], wanted)
    assert measured.decode == 0 and measured.overall == pytest.approx(measured.prefill)


def test_the_papers_setting_runs_through_the_model():
    model = llama_model(DeltaConfig.paper(threshold=1.0))
    caches = model.make_cache(prompt_length=40)
    assert {c.config.block_size for c in caches} == {2}
    model(tokens(40), cache=caches)
    assert measure_sparsity(caches, 40).prefill > 0.1


def test_a_quantized_model_attends_with_the_delta():
    model = llama_model(hidden_size=64, intermediate_size=64)
    nn.quantize(model, group_size=64, bits=8)
    ids = tokens(100)
    whole, caches = model(ids), model.make_cache()
    first = model(ids[:, :64], cache=caches)
    rest = model(ids[:, 64:], cache=caches)
    np.testing.assert_allclose(mx.concatenate([first, rest], axis=1), whole, atol=5e-3)


def test_rope_settings_are_read_in_either_spelling():
    """transformers 5 writes one rope_parameters; mlx-lm would fall back to theta 10,000."""
    scaling = VARIANTS["llama 3 rope"]["rope_scaling"]
    plain = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new = {**plain, "rope_parameters": {"rope_theta": 500000.0, **scaling}}
    args = get_model_classes(new)[1].from_dict(new)
    assert (args.rope_theta, args.rope_scaling) == (500000.0, scaling)
    assert normalize_rope(normalize_rope(new)) == normalize_rope(new)
    default = normalize_rope({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}})
    assert default["rope_theta"] == 7.0 and "rope_scaling" not in default


# Which models there are.


@pytest.mark.parametrize("model_type", ["llama", "mistral", "bitnet"])
def test_model_types_with_a_class_of_their_own(model_type):
    assert get_model_classes({"model_type": model_type})[0].__module__.startswith("mlx_delta")


def test_other_model_types_are_mlx_lms():
    assert get_model_classes({"model_type": "qwen3"})[0] is mlx_lm.models.qwen3.Model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma5"}, "Model type gemma5 not supported"),
        ({"model_type": "deepseek_v3"}, "'deepseek_v3' caches latents"),
        ({"model_type": "kimi_k2"}, "'kimi_k2' caches latents"),
        ({}, "model_type must be a string"),
    ],
    ids=["unknown", "latents", "latents under another name", "none"],
)
def test_other_model_types_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        get_model_classes(config)
