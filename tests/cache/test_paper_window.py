"""The paper's window: through mlx-lm's generator, which tells no length, and in batches."""

from __future__ import annotations

import importlib

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_delta import BatchDeltaKVCache, DeltaConfig, DeltaKVCache, measure_sparsity
from mlx_delta.cache import length_of
from tests.attention.test_hybrid import attend, inputs
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


LENGTHS = [23, 131, 60, 20]  # prompts with blocks of 1, 7, 3 and 1 tokens


def _ragged(chunk: int) -> tuple[list[DeltaKVCache], BatchDeltaKVCache]:
    """Caches of each prompt alone, and of the batch, fed in chunks with padding on the right."""
    texts = [inputs(n + 50) for n in LENGTHS]
    singles = [DeltaKVCache(DeltaConfig.paper(0.5).resolve(n)) for n in LENGTHS]
    batch = singles[0].merge(singles)
    batch.prepare(lengths=LENGTHS, right_padding=[max(LENGTHS) - n for n in LENGTHS])
    outputs = [
        feed_rows(batch, [tuple(x[:, :, start : min(start + chunk, n)] for x in text)
                          for text, n in zip(texts, LENGTHS, strict=True)], min(chunk, 131 - start))
        for start in range(0, 131, chunk)
    ]  # fmt: skip
    batch.finalize()
    for row, (cache, text, n) in enumerate(zip(singles, texts, LENGTHS, strict=True)):
        alone = attend(cache, tuple(x[:, :, :n] for x in text), [n])
        rows = np.concatenate([output[row] for output in outputs], axis=1)[:, :n]
        np.testing.assert_allclose(rows, alone[0], atol=3e-6)
    for step in range(40):  # decode: blocks end in each row at its own time
        pieces = [
            tuple(x[:, :, n + step : n + step + 1] for x in text)
            for text, n in zip(texts, LENGTHS, strict=True)
        ]
        output = feed_rows(batch, pieces, 1)
        for row, (cache, piece) in enumerate(zip(singles, pieces, strict=True)):
            np.testing.assert_allclose(output[row], attend(cache, piece, [1])[0], atol=3e-6)
    return singles, batch


@pytest.mark.parametrize("chunk", [131, 64, 10], ids="chunks of {}".format)
def test_a_ragged_batch_holds_what_each_prompt_holds_alone(chunk):
    singles, batch = _ragged(chunk)
    assert batch.block_sizes == [1, 7, 3, 1]
    for row, alone in enumerate(singles):
        own = batch.extract(row)
        assert own.config == alone.config and own.encoded == alone.encoded
        for ours, theirs in zip(own.keys_and_values(), alone.keys_and_values(), strict=True):
            assert mx.array_equal(ours, theirs)
        figures = [
            measure_sparsity([cache], LENGTHS[row], i) for cache, i in ((batch, row), (alone, 0))
        ]
        assert figures[0].prefill == figures[1].prefill > 0
        assert figures[0].decode == figures[1].decode > 0


def test_a_ragged_batch_is_copied_saved_rewound_and_filtered(tmp_path):
    _, batch = _ragged(64)
    save_prompt_cache(str(tmp_path / "batch.safetensors"), [batch])
    (loaded,) = load_prompt_cache(str(tmp_path / "batch.safetensors"))
    batch.filter([2, 1])
    loaded.filter([2, 1])
    assert batch.block_sizes == loaded.block_sizes == [3, 7]
    wanted = batch.keys_and_values()
    loaded.trim(2)
    texts = [inputs(LENGTHS[row] + 50) for row in (2, 1)]
    pieces = [
        tuple(x[:, :, LENGTHS[row] + 38 : LENGTHS[row] + 40] for x in text)
        for row, text in zip((2, 1), texts, strict=True)
    ]
    feed_rows(loaded, pieces, 2)
    for row in range(2):
        ours, theirs = (cache.extract(row).keys_and_values()[0] for cache in (loaded, batch))
        assert mx.array_equal(ours, theirs)
    assert loaded.keys_and_values()[0].shape == wanted[0].shape


def test_rows_of_another_threshold_share_no_batch():
    caches = [DeltaKVCache(DeltaConfig.paper(t).resolve(100)) for t in (0.5, 0.6)]
    with pytest.raises(ValueError, match="must have the same setting"):
        caches[0].merge(caches)


def feed_rows(cache: BatchDeltaKVCache, pieces, steps: int) -> mx.array:
    """Feed each row its piece [1, H, up to steps, D], padded on the right."""
    padded = [
        [
            np.pad(x, [(0, 0), (0, 0), (0, steps - x.shape[2]), (0, 0)], constant_values=5.0)
            for x in p
        ]
        for p in pieces
    ]
    stacked = [np.concatenate(x) for x in zip(*padded, strict=True)]
    return attend(cache, stacked, [steps], cache.make_mask(steps))
