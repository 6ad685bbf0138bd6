"""``apply``: any of mlx-lm's models attends with the delta as the ones built with it do."""

from __future__ import annotations

import copy
import dataclasses
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import base, deepseek_v3, gemma2, gemma3_text, gpt_oss, mamba, qwen2, qwen3
from mlx_lm.models import llama as stock_llama
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from mlx_delta import DeltaConfig, DeltaKVCache, apply, batch_generate, load, remove
from mlx_delta.attention import handed
from mlx_delta.attention.hybrid import attend_to_step
from mlx_delta.cache.check_state import length_of
from mlx_delta.generate.command import main
from mlx_delta.measure.settings import parse_settings
from mlx_delta.measure.sparsity import measure_sparsity
from mlx_delta.measure.traffic import decode_traffic
from mlx_delta.models.anatomy import context_length, dense_caches, trace_heads
from tests.tiny import LLAMA, SMALL, llama_model, tokens, write_checkpoint

PLAIN = {**LLAMA, "tie_word_embeddings": True}
WINDOWS = {
    **PLAIN,
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
}
DELTAS = SMALL.changed(level=0.03, key_bits=4, value_bits=16)


def random_model(architecture, seed: int = 0, **changes) -> nn.Module:
    """A model of mlx-lm's with weights that make attention depend on what it looks at."""
    config = {**PLAIN, "model_type": architecture.__name__.rpartition(".")[2], **changes}
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = [
        (name, mx.array(rng.normal(size=w.shape) * 0.3 if w.ndim > 1 else np.ones(w.shape)))
        for name, w in sorted(tree_flatten(model.parameters()))
    ]
    model.load_weights(weights)
    model.set_dtype(mx.float32)
    model.eval()
    return model


def windowed(**changes) -> nn.Module:
    return random_model(gemma3_text, **{**WINDOWS, **changes})


# Against the models that are built with the delta.


@pytest.mark.parametrize(
    "config", [SMALL, DELTAS, DeltaConfig.paper()], ids=["", "deltas", "paper"]
)
def test_a_llama_of_mlx_lms_becomes_ours(config):
    ours, ids = llama_model(config), tokens(150)
    model = stock_llama.Model(stock_llama.ModelArgs.from_dict(LLAMA))
    model.load_weights(tree_flatten(ours.parameters()))
    apply(model, config)
    assert mx.array_equal(model(ids), ours(ids))
    theirs, caches = ours.make_cache(), model.make_cache()
    for part in (ids[:, :70], ids[:, 70:149], ids[:, 149:]):
        assert mx.array_equal(model(part, cache=caches), ours(part, cache=theirs))


def test_scores_of_heads_that_add_no_value_take_part():
    """gpt-oss gives each head a score of its own in the softmax."""
    rng = np.random.default_rng(0)
    queries = mx.array(rng.normal(size=(1, 4, 60, 16)).astype(np.float32))
    keys, values = (mx.array(rng.normal(size=(1, 2, 60, 16)).astype(np.float32)) for _ in "kv")
    scores = mx.array([2.0, -1.0, 0.5, 3.0])
    exact = DeltaConfig(**{**SMALL.to_dict(), "threshold": 0.0})
    found = attend_to_step(
        queries, DeltaKVCache(exact).update(keys, values), 0.25, "causal", scores
    )
    expected = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=0.25, mask="causal", sinks=scores
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_mask_means_none():
    """To mlx-lm's attention; to delta attention by itself it means a causal one."""
    model, ids = random_model(qwen3), tokens(30)
    queries, keys, values = (
        mx.array(np.random.default_rng(i).normal(size=(1, 2, 30, 16))) for i in range(3)
    )
    cache = handed.HandingCache(DeltaKVCache(DeltaConfig(window=64)))
    fetched = cache.update_and_fetch(keys, values)
    found = handed.scaled_dot_product_attention(
        queries, *fetched, cache=cache, scale=1.0, mask=None
    )
    expected = base.scaled_dot_product_attention(queries, keys, values, None, 1.0, None)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model(ids).shape == (1, 30, PLAIN["vocab_size"])


# What stays as it was.


def test_other_models_of_the_same_file_are_left_alone():
    config, ids = qwen3.ModelArgs.from_dict({**PLAIN, "model_type": "qwen3"}), tokens(80)
    one, other = qwen3.Model(config), qwen3.Model(config)
    before = other(ids)
    apply(one, SMALL)
    assert mx.array_equal(other(ids), before) and mx.array_equal(
        other(ids, cache=make_prompt_cache(other)), before
    )
    assert not hasattr(other.args, "delta") and type(other) is qwen3.Model
    assert [type(cache) for cache in make_prompt_cache(other)] == [KVCache] * 3


def test_remove_and_unhook_leave_nothing():
    model, ids = random_model(qwen2), tokens(80)
    dense, args = model(ids), model.args
    apply(apply(model, DELTAS), SMALL)
    assert model.args.delta == SMALL and not mx.array_equal(model(ids), dense)
    assert isinstance(model, qwen2.Model) and model.args is not args
    remove(model)
    assert mx.array_equal(model(ids), dense)
    assert type(model) is qwen2.Model and model.args is args
    assert qwen2.scaled_dot_product_attention is handed.scaled_dot_product_attention
    handed.unhook(model)
    assert qwen2.scaled_dot_product_attention is base.scaled_dot_product_attention
    with pytest.raises(ValueError, match="was not applied"):
        remove(model)


def test_weights_keep_their_names_and_a_copy_attends_alike():
    model, ids = random_model(qwen3), tokens(80)
    names = [name for name, _ in tree_flatten(model.parameters())]
    apply(model, SMALL)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert mx.array_equal(copy.deepcopy(model)(ids), model(ids))


def test_with_a_tokenizer_channels_are_weighed_as_load_does():
    model, (_, tokenizer) = windowed(), load()
    found = apply(model, DeltaConfig(), tokenizer).args.delta.sensitivities
    assert [layer is None for layer in found.layers] == [True, False] * 2
    assert apply(model, DeltaConfig()).args.delta.sensitivities is None


def test_layers_with_windows_keep_mlx_lms_caches():
    model = apply(windowed(), SMALL)
    kinds = [type(cache) for cache in model.make_cache()]
    assert kinds == [RotatingKVCache, DeltaKVCache] * 2
    assert [type(cache) for cache in dense_caches(model)] == [RotatingKVCache, KVCache] * 2


# What is refused.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: random_model(gemma2, query_pre_attn_scalar=16), "gemma2 computes with"),
        (
            lambda: deepseek_v3.Model(
                deepseek_v3.ModelArgs(
                    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
                    v_head_dim=8, qk_nope_head_dim=8, n_routed_experts=None, intermediate_size=32,
                )
            ),
            "deepseek_v3 caches latents",
        ),
        (
            lambda: mamba.Model(
                mamba.ModelArgs(
                    model_type="mamba", vocab_size=64, hidden_size=32, intermediate_size=64,
                    state_size=8, num_hidden_layers=2, conv_kernel=4, use_bias=False,
                    use_conv_bias=True, time_step_rank=4,
                )
            ),
            "mamba has no layer with ordinary keys and values, only ArraysCache",
        ),
        (llama_model, "this llama has the delta built in"),
    ],
    ids=["capped scores", "latents", "recurrent", "built in"],
)  # fmt: skip
def test_other_models_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        apply(model(), SMALL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeltaConfig(threshold=(1.0, 2.0)), "2 values but the model has 3 layers"),
        (DeltaConfig(threshold=((1.0,),) * 3), "layer 0 but it has 2 kv heads"),
        ({"threshold": 1.0}, "config must be a DeltaConfig"),
    ],
    ids=["layers", "heads", "a dict"],
)
def test_a_setting_that_does_not_fit_is_refused(config, message):
    model = random_model(qwen3)
    with pytest.raises(ValueError, match=message):
        apply(model, config)
    assert type(model) is qwen3.Model


def test_a_refused_model_is_still_mlx_lms():
    model, ids = random_model(gemma2, query_pre_attn_scalar=16), tokens(40)
    dense = model(ids)
    with pytest.raises(ValueError):
        apply(model, SMALL)
    assert type(model) is gemma2.Model
    assert mx.array_equal(model(ids, cache=make_prompt_cache(model)), dense)


# Every way in agrees.

each_model = pytest.mark.parametrize(
    "make", [lambda: random_model(qwen3), windowed], ids=["qwen3", "gemma3"]
)


def continued(model, prompt, **options) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=12, **options)
    return [int(token) for token, _ in steps]


@each_model
def test_prompts_of_a_batch_go_on_as_by_themselves(make):
    model = apply(make(), SMALL)
    _, tokenizer = load()
    prompts = [tokens(length, seed=length)[0].tolist() for length in (90, 40, 7)]
    responses = batch_generate(model, tokenizer, prompts, max_tokens=12)
    alone = [tokenizer.decode(continued(model, prompt)) for prompt in prompts]
    assert [text.strip() for text in responses.texts] == [text.strip() for text in alone]


@each_model
def test_a_saved_prompt_goes_on_as_it_was(make, tmp_path):
    model, prompt = apply(make(), SMALL), tokens(90)[0]
    caches = model.make_cache()
    model(prompt[None, :80], cache=caches)
    save_prompt_cache(str(tmp_path / "prompt.safetensors"), caches)
    loaded = load_prompt_cache(str(tmp_path / "prompt.safetensors"))
    assert [type(cache) for cache in loaded] == [type(cache) for cache in caches]
    expected = continued(model, prompt)
    assert continued(model, prompt[80:], prompt_cache=loaded) == expected
    assert length_of(loaded) > 80


def test_drafted_tokens_change_nothing():
    model, draft = apply(random_model(qwen3), SMALL), apply(random_model(qwen2, seed=1), SMALL)
    prompt = tokens(90)[0]
    drafted = speculative_generate_step(prompt, model, draft, num_draft_tokens=3, max_tokens=12)
    assert [int(token) for token, *_ in drafted] == continued(model, prompt)


def test_quantized_weights_change_nothing_of_it():
    model, ids = random_model(qwen3, hidden_size=64, intermediate_size=64), tokens(100)
    nn.quantize(model, group_size=32, bits=8)
    dense = model(ids)
    apply(model, SMALL)
    caches = model.make_cache()
    parts = [model(ids[:, :60], cache=caches), model(ids[:, 60:], cache=caches)]
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), model(ids), atol=2e-3)
    assert not mx.array_equal(model(ids), dense)


# What measures a model finds its way.


def test_heads_are_found_by_watching():
    heads = trace_heads(apply(windowed(), SMALL))
    assert {dataclasses.astuple(layer) for layer in heads} == {(4, 2, 16, 16)}
    assert context_length(windowed()) is None or context_length(windowed()) > 0
    assert context_length(random_model(qwen3)) == PLAIN["max_position_embeddings"]


def test_watching_reads_no_weight():
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**PLAIN, "model_type": "qwen3"}))
    weights = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    before = mx.get_active_memory()
    trace_heads(model)
    assert mx.get_active_memory() - before < weights / 4
    mx.eval(model.parameters())  # that they could be computed was all they were
    assert mx.get_active_memory() - before > weights / 2


@pytest.mark.parametrize("name", ["dense", "delta", "kv8", "window-only", "rotating:32"])
def test_settings_make_caches_for_layers_with_windows(name):
    (setting,) = parse_settings([name], SMALL)
    model = windowed(head_dim=64)
    if setting.delta is not None:
        apply(model, SMALL)
    caches = setting.make_caches(model)
    setting.prefill(model, tokens(60)[0].tolist(), caches)
    assert isinstance(caches[0], RotatingKVCache) and length_of(caches) == 60


def test_a_windowed_model_is_measured():
    model = apply(windowed(), SMALL)
    caches = model.make_cache()
    mx.eval(model(tokens(100), cache=caches))
    sparsity = measure_sparsity(caches, 100)
    assert sparsity.prefill_heads.shape == (2, 2) and sparsity.prefill > 0.05
    traffic = decode_traffic(model, caches)
    # Two layers with windows of 16 tokens, two that see all 100; four heads, 16 + 16 elements.
    assert traffic.attention_macs == 2 * (16 + 100) * 4 * 32 and traffic.skippable_macs > 0


# Checkpoints as they come.

SHAPES = {
    "qwen": (qwen3, {**PLAIN, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}),
    "mistral": (
        stock_llama,
        {**PLAIN, "model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    ),
    "gemma": (gemma3_text, {**WINDOWS, "architectures": ["Gemma3ForCausalLM"]}),
}


@pytest.fixture(params=SHAPES)
def checkpoint(request, tmp_path):
    architecture, config = SHAPES[request.param]
    model = random_model(architecture, **{k: v for k, v in config.items() if k != "architectures"})
    return write_checkpoint(
        tmp_path / request.param, config, dict(tree_flatten(model.parameters()))
    )


def test_a_checkpoint_loads_by_its_path_with_the_delta_on(checkpoint):
    model, _ = load(checkpoint)
    assert model.args.delta.changed(sensitivities=None) == DeltaConfig()
    assert any(isinstance(cache, DeltaKVCache) for cache in model.make_cache())
    dense, _ = load(checkpoint, None)
    ids = tokens(300)
    # All of the first 60 are in the window.
    np.testing.assert_allclose(model(ids[:, :60]), dense(ids[:, :60]), atol=1e-4)
    assert not np.allclose(model(ids), dense(ids), atol=1e-2)


def test_a_checkpoint_generates_with_no_flag(checkpoint, capsys):
    status = main(["--model", str(checkpoint), "-p", "night " * 250, "-m", "5", "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    values = json.loads(out)
    assert values["generation_tokens"] == 5
    assert values["delta"]["block_size"] == DeltaConfig().block_size
    assert values["prefill_sparsity"] > 0.01


def test_rope_settings_of_any_model_are_read_in_either_spelling(tmp_path):
    """transformers 5 writes one rope_parameters; mlx-lm's Qwen2 would take its default theta."""
    weights = dict(tree_flatten(random_model(qwen2).parameters()))
    config = {**PLAIN, "model_type": "qwen2", "rope_theta": 500.0}
    old, _ = load(write_checkpoint(tmp_path / "old", config, weights))
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "default"}
    new, _ = load(write_checkpoint(tmp_path / "new", config, weights))
    assert mx.array_equal(old(tokens(50)), new(tokens(50)))


def test_head_scores_of_a_whole_model():
    """gpt-oss with windows and head scores: nothing held is mlx-lm's answer."""
    model = random_model(
        gpt_oss, num_local_experts=2, num_experts_per_tok=1, sliding_window=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    ids = tokens(100)
    dense = model(ids)
    apply(model, DeltaConfig(**{**SMALL.to_dict(), "threshold": 0.0}))
    np.testing.assert_allclose(model(ids), dense, atol=2e-3)
    apply(model, SMALL)
    assert not np.allclose(model(ids), dense, atol=1e-2)
