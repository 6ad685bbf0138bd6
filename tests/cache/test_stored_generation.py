"""Generating with stored keys: mlx-lm's generators, one by one, in batches, and speculating."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlx_delta
from mlx_delta import DeltaConfig

PROMPT = "The boy went down to the river in the morning and looked for his father's boat. " * 12
FORMS = {
    "codes": DeltaConfig(block_size=16, window=16, key_format="codes", key_bits=4, value_bits=4),
    "deltas": DeltaConfig(block_size=16, window=16, key_bits=4, value_bits=16),
}
each_form = pytest.mark.parametrize("setting", FORMS.values(), ids=FORMS)


@each_form
def test_a_batch_says_what_its_rows_say(setting):
    model, tokenizer = mlx_delta.load("demo", setting)
    prompts = [
        tokenizer.encode(PROMPT)[:n] for n in (40, 131, 94)
    ]  # at none of them is a word a tie
    alone = [mlx_delta.generate(model, tokenizer, p, max_tokens=12) for p in prompts]
    together = mlx_delta.batch_generate(model, tokenizer, prompts, max_tokens=12).texts
    assert [text.strip() for text in together] == [text.strip() for text in alone]


def test_speculative_decoding_rewinds():
    model, tokenizer = mlx_delta.load("demo", FORMS["deltas"])
    prompt = tokenizer.encode(PROMPT)[:100]
    plain = mlx_delta.generate(model, tokenizer, prompt, max_tokens=20)
    draft, _ = mlx_delta.load("demo", None)
    guessed = mlx_delta.generate(
        model, tokenizer, prompt, max_tokens=20, draft_model=draft, num_draft_tokens=3
    )
    assert guessed == plain


@each_form
def test_the_cache_is_small_while_it_is_used(setting):
    model, tokenizer = mlx_delta.load("demo", setting)
    prompt = mx.array(tokenizer.encode(PROMPT * 8)[:1500])
    caches = model.make_cache()
    for _ in mlx_delta.stream_generate(model, tokenizer, prompt, max_tokens=8, prompt_cache=caches):
        pass
    dense = sum(cache.dense_nbytes for cache in caches)  # float32 without a GPU
    assert sum(cache.key_nbytes for cache in caches) < 0.5 * dense / 2
    assert caches[0].config.key_format == setting.key_format
