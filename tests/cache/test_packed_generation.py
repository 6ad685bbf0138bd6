"""Generating with packed caches: mlx-lm's generators, one by one, in batches, and speculating."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest

import mlx_delta
from mlx_delta import DeltaConfig

PROMPT = "The boy went down to the river in the morning and looked for his father's boat. " * 12
WIDTHS = [(16, None), (16, 16), (4, 16), (4, 4)]
each_width = pytest.mark.parametrize(("key_bits", "value_bits"), WIDTHS)


def demo(key_bits: int | None, value_bits: int | None):
    setting = DeltaConfig(
        block_size=16, window=16, key_bits=key_bits, value_bits=value_bits, threshold=0.5
    )
    return mlx_delta.load("demo", setting)


@each_width
def test_a_batch_says_what_its_rows_say(key_bits, value_bits):
    model, tokenizer = demo(key_bits, value_bits)
    prompts = [tokenizer.encode(PROMPT)[:n] for n in (40, 131, 90)]
    alone = [mlx_delta.generate(model, tokenizer, p, max_tokens=12) for p in prompts]
    together = mlx_delta.batch_generate(model, tokenizer, prompts, max_tokens=12).texts
    assert [text.strip() for text in together] == [text.strip() for text in alone]


def test_sixteen_bits_say_what_dense_storage_says():
    prompt = None
    texts = []
    for widths in ((None, None), (16, 16)):
        model, tokenizer = demo(*widths)
        prompt = prompt or tokenizer.encode(PROMPT)[:150]
        texts.append(mlx_delta.generate(model, tokenizer, prompt, max_tokens=24))
    assert texts[0] == texts[1]


def test_speculative_decoding_rewinds():
    model, tokenizer = demo(4, 16)
    prompt = tokenizer.encode(PROMPT)[:100]
    plain = mlx_delta.generate(model, tokenizer, prompt, max_tokens=20)
    draft, _ = mlx_delta.load("demo", None)
    guessed = mlx_delta.generate(
        model, tokenizer, prompt, max_tokens=20, draft_model=draft, num_draft_tokens=3
    )
    assert guessed == plain


@each_width
def test_the_cache_is_small_while_it_is_used(key_bits, value_bits):
    model, tokenizer = demo(key_bits, value_bits)
    prompt = mx.array(tokenizer.encode(PROMPT * 8)[:1500])
    caches = model.make_cache()
    for _ in mlx_delta.stream_generate(model, tokenizer, prompt, max_tokens=8, prompt_cache=caches):
        pass
    dense = sum(cache.dense_nbytes for cache in caches)  # float32 without a GPU
    assert sum(cache.key_nbytes for cache in caches) < 0.5 * dense / 2
    config = caches[0].config
    assert config == dataclasses.replace(config, key_bits=key_bits, value_bits=value_bits)
