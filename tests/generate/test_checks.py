"""Misuse of the Python API is named before anything runs."""

from __future__ import annotations

import subprocess
import sys
import warnings

import mlx.core as mx
import pytest

from mlx_delta import DeltaConfig, batch_generate, generate, load, stream_generate
from mlx_delta.generate import make_caches, memory
from mlx_delta.system.kv import kv_fields
from tests.tiny import SMALL, llama_model, write_llama

CONTEXT = 40
CODED = DeltaConfig().changed(**kv_fields("small"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    return load(write_llama(path, max_position_embeddings=CONTEXT), SMALL)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a text", "must be a list of texts, or of lists of token ids, but got str"),
        ([1, 2], "must be a list of texts, or of lists of token ids, but got list"),
        (mx.array([1]), "must be a list of texts"),
        ([[1], [4096]], "the model has tokens 0 to 4095 but got 4096"),
        ([[1], [1.5]], "a prompt is a text or whole numbers but has 1.5"),
        ([[1], [1] * (CONTEXT + 1)], "the prompt has 41 tokens but the model's context has 40"),
    ],
    ids=["a text", "token ids", "an array", "token", "fraction", "too long"],
)
def test_batches(loaded, prompts, message):
    with pytest.raises(ValueError, match=message):
        batch_generate(*loaded, prompts)


@pytest.mark.parametrize("option", ["max_tokens", "prompt_caches"])
def test_options_for_another_number_of_prompts(loaded, option):
    with pytest.raises(ValueError, match=f"{option} has 3 values but there are 2 prompts"):
        batch_generate(*loaded, [[1], [2]], **{option: [1, 2, 3]})


@pytest.mark.parametrize("token", [2**40, -1, 4096, True, 1.5, None, "x"], ids=str)
def test_tokens_that_the_model_does_not_have(loaded, token):
    for run in (
        generate,
        lambda *a: list(stream_generate(*a)),
        lambda m, t, p: batch_generate(m, t, [p]),
    ):
        with pytest.raises(ValueError, match="the model has tokens|whole numbers"):
            run(*loaded, [1, token, 2])


def test_arrays_of_tokens(loaded):
    first = [r.token for r in stream_generate(*loaded, mx.array([1, 2, 3]), max_tokens=4)]
    assert first == [r.token for r in stream_generate(*loaded, [1, 2, 3], max_tokens=4)]
    with pytest.raises(ValueError, match="must have one dimension but got 2"):
        stream_generate(*loaded, mx.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"the model has tokens 0 to 4095 but got 1099511627776"):
        stream_generate(*loaded, mx.array([2**40]))


@pytest.mark.parametrize(("length", "fits"), [(CONTEXT - 1, 1), (CONTEXT, 1), (CONTEXT + 1, 0)])
def test_a_prompt_as_long_as_the_context(loaded, length, fits):
    if not fits:
        with pytest.raises(ValueError, match=f"has {length} tokens but the model's context has"):
            stream_generate(*loaded, [5] * length, max_tokens=1)
        return
    responses = list(stream_generate(*loaded, [5] * length, max_tokens=1))
    assert responses[-1].generation_tokens == fits


@pytest.mark.parametrize(("dense", "cached"), [(True, 30), (False, 30)], ids=["dense", "delta"])
def test_what_is_cached_counts(loaded, dense, cached):
    model, tokenizer = loaded
    caches = make_caches(model) if not dense else make_caches(llama_model(None), max_kv_size=8)
    for _ in stream_generate(model, tokenizer, [5] * cached, max_tokens=1, prompt_cache=caches):
        pass
    seen = caches[0].offset  # with a token that was fed ahead
    with pytest.raises(ValueError, match="has 41 tokens but the model's context has 40"):
        stream_generate(model, tokenizer, [5] * (41 - seen), prompt_cache=caches)
    assert list(stream_generate(model, tokenizer, [5] * (40 - seen), prompt_cache=caches))


def test_answers_end_with_the_context(loaded):
    with pytest.warns(UserWarning, match=r"max_tokens=100: at most 10 tokens fit the model's"):
        responses = list(stream_generate(*loaded, [5] * 30, max_tokens=100))
    assert responses[-1].generation_tokens == 10
    with pytest.warns(UserWarning, match="at most 1 token fits"):
        batch_generate(*loaded, [[5] * 40, [5] * 3], max_tokens=[2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for more in ({}, {"max_tokens": -1}, {"max_tokens": 10}):
            responses = list(stream_generate(*loaded, [5] * 30, **more))
            assert responses[-1].generation_tokens == 10


@pytest.mark.parametrize("number", [0, -2, 1.5, "7", None, True], ids=repr)
def test_numbers_of_tokens(loaded, number):
    with pytest.raises(ValueError, match="max_tokens must be positive"):
        stream_generate(*loaded, [1], max_tokens=number)
    with pytest.raises(ValueError, match="max_tokens must be positive"):
        batch_generate(*loaded, [[1]], max_tokens=number)


def test_caches_for_some_of_the_layers(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="the prompt cache has 2 layers but the model has 3"):
        stream_generate(model, tokenizer, [1], prompt_cache=make_caches(model)[:2])
    with pytest.raises(ValueError, match="the prompt cache has 2 layers but the model has 3"):
        batch_generate(model, tokenizer, [[1]], prompt_caches=[make_caches(model)[:2]])


def test_caches_with_a_draft_model(loaded):
    model, tokenizer = loaded
    draft = llama_model(None, num_hidden_layers=2)
    whole = generate(model, tokenizer, [1, 2, 3], max_tokens=8)
    for more in ([], make_caches(draft)):
        caches = [*make_caches(model), *more]
        options = {"prompt_cache": caches, "draft_model": draft, "max_tokens": 8}
        assert generate(model, tokenizer, [1, 2, 3], **options) == whole
    with pytest.raises(ValueError, match="has 2 layers but the model has 5"):
        generate(model, tokenizer, [1], **{**options, "prompt_cache": make_caches(draft)})


@pytest.mark.parametrize("steps", [0, -3, 9])
def test_guesses_beyond_what_can_be_rewound(loaded, steps):
    options = {"draft_model": llama_model(None), "num_draft_tokens": steps}
    with pytest.raises(ValueError, match=f"num_draft_tokens must be >= 1.* but got {steps}"):
        generate(*loaded, [1], **options)


def test_dense_options_that_exclude_each_other(loaded):
    dense, tokenizer = llama_model(None), loaded[1]
    with pytest.raises(ValueError, match="max_kv_size=64 and kv_bits=8 do not go together"):
        generate(dense, tokenizer, [1], max_kv_size=64, kv_bits=8)
    with pytest.raises(ValueError, match="max_kv_size=64 does not go together with a draft"):
        generate(dense, tokenizer, [1], max_kv_size=64, draft_model=dense)
    with pytest.raises(ValueError, match="needs a kv_group_size that divides .* 16 but got 64"):
        generate(dense, tokenizer, [1], kv_bits=8)


# Memory.


@pytest.mark.parametrize("free", [-1, 1_000], ids=["none", "little"])
def test_memory_that_is_not_there(loaded, monkeypatch, free):
    monkeypatch.setattr(memory, "free_memory", lambda *_: (free, "the machine"))
    message = "leaves no room" if free < 0 else "the caches of 30 tokens take .* the machine leaves"
    with pytest.raises(MemoryError, match=message):
        stream_generate(*loaded, [5] * 30)


def test_smaller_caches_are_advised_with_their_bytes(loaded, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda *_: (4_000_000, "the machine"))
    with pytest.raises(MemoryError, match=r"use --kv small \(4 MB\), a shorter prompt, a smaller"):
        memory.check_memory("generate", loaded[0], 1800, {})


def test_the_estimate_is_no_more_than_what_caches_take():
    for delta in (None, SMALL, DeltaConfig(key_bits=4, value_bits=4), CODED):
        model = llama_model(delta, head_dim=32)
        caches = make_caches(model)
        mx.eval(model(mx.zeros((1, 256), mx.int32), cache=caches))
        scores = 4 * 4 * 128 * 256
        taken = sum(c.nbytes for c in caches)
        assert 0 < memory.estimate(model, 256) - scores <= taken
        assert delta is not None or memory.estimate(model, 256) - scores == taken


def test_a_huge_window_is_counted():
    deltas = llama_model(DeltaConfig(window=2**24, key_bits=4), head_dim=32)
    assert memory.estimate(deltas, 10) > 10**9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on address space")
def test_a_limit_on_address_space_is_said_not_died_of(tmp_path):
    program = (
        "import resource, sys, mlx_delta\n"
        "from mlx_delta.generate import memory\n"
        "from mlx_delta.generate.command import main\n"
        "real = memory.free_memory\n"
        "memory.free_memory = lambda *reserved: ("
        "resource.setrlimit(resource.RLIMIT_AS, (BYTES, -1)), real(*reserved))[1]\n"
        "sys.exit(main(['-p', 'hi', '-m', '3']))\n"
    )
    # As much as is taken when the check is made, and a little more.
    limit = "int(open('/proc/self/statm').read().split()[0]) * 4096 + (100 << 20)"
    run = subprocess.run(
        [sys.executable, "-c", program.replace("BYTES", limit)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "(ulimit -v) leaves no room to generate in" in run.stderr
