"""The paper's window through mlx-lm's own generator, which tells a cache no prompt's length."""

from __future__ import annotations

import importlib

import mlx.core as mx
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.cache import length_of
from tests.tiny import llama_model, tokens

# The module; `mlx_lm.generate` is the function of that name.
generate_module = importlib.import_module("mlx_lm.generate")


@pytest.mark.parametrize("step", [2048, 512, 100, 64, 33])
@pytest.mark.parametrize("prompt", [401, 380, 130])
def test_the_window_is_a_share_of_the_prompt_however_it_is_cut(prompt, step):
    model = llama_model(delta=DeltaConfig.paper(0.5))
    caches = model.make_cache()
    generated = generate_module.generate_step(
        tokens(prompt)[0], model, max_tokens=3, prompt_cache=caches, prefill_step_size=step
    )
    assert len(list(generated)) == 3
    sizes = {cache.config.block_size for cache in caches}
    # A last chunk of a few tokens is taken for the end of the prompt: then one token is missing.
    (size,) = sizes
    assert size in (round(0.05 * prompt), round(0.05 * (prompt - 1)))
    assert all(cache.encoded[0] > 0 for cache in caches)


def test_4096_tokens_in_two_chunks():
    """205, not the 102 that are a share of the first chunk."""
    model = llama_model(delta=DeltaConfig.paper(0.5), num_hidden_layers=1, vocab_size=64)
    model.args.max_position_embeddings = 8192
    caches = model.make_cache()
    prompt = tokens(4096)[0] % 64
    next(generate_module.generate_step(prompt, model, max_tokens=1, prompt_cache=caches))
    assert length_of(caches) >= 4096
    assert {cache.config.block_size for cache in caches} == {205}


def test_a_model_without_a_cache_takes_the_text_for_the_prompt():
    """As mlx-lm's perplexity calls it: what was known from the start gives the same logits."""
    model, text = llama_model(delta=DeltaConfig.paper(0.5)), tokens(120)
    wanted = model(text, cache=model.make_cache(prompt_length=120))
    assert mx.array_equal(model(text), wanted)
    dense = llama_model(delta=None)(text)
    assert not mx.allclose(model(text), dense, atol=1e-3)
