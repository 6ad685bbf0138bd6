"""The Python API: text comes out the same by every way in, and misuse is named."""

from __future__ import annotations

import pytest
from mlx_lm import generate as stock_generate
from mlx_lm import load as stock_load
from mlx_lm.models.cache import RotatingKVCache

import mlx_delta
import mlx_delta.generate.command  # noqa: F401  (must not hide the function of that name)
from mlx_delta import DeltaConfig, batch_generate, generate, load, stream_generate
from mlx_delta.generate import make_caches
from tests.tiny import SMALL, write_llama

PROMPT = "It was a dark night, and the wind was in the trees. " * 12


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def loaded(path):
    return load(path, SMALL)


def test_dense_generation_is_mlx_lms(path):
    model, tokenizer = load(path, None)
    stock_model, stock_tokenizer = stock_load(str(path))
    ours = generate(model, tokenizer, PROMPT, max_tokens=20)
    assert ours == stock_generate(stock_model, stock_tokenizer, PROMPT, max_tokens=20)


def test_streamed_batched_and_whole_texts_agree(loaded):
    model, tokenizer = loaded
    prompts = [PROMPT, PROMPT[:100], PROMPT[50:400]]
    whole = [generate(model, tokenizer, p, max_tokens=20) for p in prompts]
    streamed = [
        "".join(r.text for r in stream_generate(model, tokenizer, p, max_tokens=20))
        for p in prompts
    ]
    assert streamed == whole
    batch = batch_generate(model, tokenizer, prompts, max_tokens=20)
    # mlx-lm drops a leading space when it streams, not when it decodes a batch.
    assert [text.lstrip() for text in batch.texts] == whole
    by_ids = batch_generate(
        model, tokenizer, [tokenizer.encode(p) for p in prompts], max_tokens=[20, 20, 20]
    )
    assert by_ids.texts == batch.texts


@pytest.mark.parametrize("step", [1, 7, 64, 2048])
def test_the_prefill_step_changes_nothing(loaded, step):
    model, tokenizer = loaded
    whole = generate(model, tokenizer, PROMPT, max_tokens=10)
    assert whole == generate(model, tokenizer, PROMPT, max_tokens=10, prefill_step_size=step)


def test_speculative_decoding_gives_the_models_own_text(loaded):
    model, tokenizer = loaded
    draft, _ = load("demo", None)
    whole = generate(model, tokenizer, PROMPT, max_tokens=30)
    for drafter in (draft, model):
        assert whole == generate(
            model, tokenizer, PROMPT, max_tokens=30, draft_model=drafter, num_draft_tokens=3
        )


def test_a_prompt_cache_is_continued(loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode(PROMPT)
    caches = make_caches(model)
    model_text = generate(model, tokenizer, ids, max_tokens=10)
    for _ in stream_generate(model, tokenizer, ids[:50], max_tokens=1, prompt_cache=caches):
        pass
    for cache in caches:
        cache.trim(cache.offset - 50)
    assert model_text == generate(model, tokenizer, ids[50:], max_tokens=10, prompt_cache=caches)


def test_the_papers_window_follows_the_prompt(path):
    model, tokenizer = load(path, DeltaConfig.paper())
    caches = make_caches(model, prompt_tokens=60)
    assert {c.config.block_size for c in caches} == {3}
    assert generate(model, tokenizer, PROMPT, max_tokens=5)


def test_a_dense_model_keeps_as_much_as_it_is_told(path):
    model, tokenizer = load(path, None)
    assert [type(c) for c in make_caches(model, max_kv_size=32)] == [RotatingKVCache] * 3
    assert generate(model, tokenizer, PROMPT, max_tokens=5, max_kv_size=32)


def test_the_public_names():
    assert set(mlx_delta.__all__) == {
        "BatchDeltaKVCache", "DeltaConfig", "DeltaKVCache", "Sparsity", "batch_generate",
        "apply", "generate", "load", "measure_sparsity", "remove", "stream_generate",
    }  # fmt: skip
    for name in mlx_delta.__all__:
        assert getattr(mlx_delta, name).__doc__


@pytest.mark.parametrize("run", [generate, lambda *a, **k: list(stream_generate(*a, **k))])
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([5] * 2049, {}, "the prompt has 2049 tokens but the model's context has 2048"),
        ("x", {"kv_bits": 8}, "kv_bits=8 does not go together with the delta"),
        ("x", {"max_kv_size": 8}, "max_size must be a whole number from"),
    ],
    ids=["empty", "no tokens", "too long", "kv_bits", "max_kv_size"],
)
def test_misuse_is_named(loaded, run, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        run(*loaded, prompt, **options)


def test_misuse_of_batches_is_named(loaded, path):
    with pytest.raises(ValueError, match=r"\[batch_generate\] there are no prompts"):
        batch_generate(*loaded, [])
    with pytest.raises(ValueError, match=r"\[batch_generate\] the prompt is empty"):
        batch_generate(*loaded, ["x", ""])
    with pytest.raises(ValueError, match="can't be shared by a batch"):
        batch_generate(*load(path, DeltaConfig.paper()), ["x", "y"])
