"""What people run: SmolLM2-135M-Instruct as ``--model smollm2`` gives it, with the delta."""

from __future__ import annotations

import copy
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import generate, measure_sparsity
from mlx_delta.measure.settings import Setting
from mlx_delta.measure.text import BUNDLED_TEXT, encode_text, prompt_ids, read_text
from mlx_delta.system.devices import has_gpu
from tests.real_model.forward import Llama

CITIES = ("Paris", "London", "Berlin", "Madrid")
DENSE = Setting("dense", "dense")


@pytest.fixture(scope="module")
def model(loaded) -> Any:
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded) -> Any:
    return loaded[1]


@pytest.fixture(scope="module")
def delta(model) -> Setting:
    """The setting that the model is loaded with when none is named."""
    return Setting("delta", "delta", model.args.delta)


def log_softmax(logits: Any) -> np.ndarray:
    logits = np.array(logits, np.float32)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64))


def divergence(true: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of each row's log-probabilities, in nats."""
    return (np.exp(true) * (true - other)).sum(-1)


def test_it_holds_keys_by_calibrated_sensitivities(model):
    setting = model.args.delta
    assert setting.cuts_runs and setting.sensitivities.file is not None
    assert setting.level == pytest.approx(setting.sensitivities.level_for(zeros=0.72), rel=1e-3)
    assert setting.window == 128


def test_it_completes_a_sentence(model, tokenizer):
    text = generate(model, tokenizer, tokenizer.encode("The capital of France is"), max_tokens=6)
    assert "Paris" in text


def test_it_answers_a_question(model, tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in generate(model, tokenizer, ids, max_tokens=10)


def test_its_logits_are_those_of_an_independent_forward_pass(model, tokenizer, gguf):
    ids = encode_text(tokenizer, read_text(BUNDLED_TEXT)[2000:2200])
    true = log_softmax(Llama(gguf)(ids))
    ours = log_softmax(DENSE.forward(model, ids, DENSE.make_caches(model, len(ids))))
    assert divergence(true, ours).max() < (1e-3 if has_gpu() else 1e-6)
    if not has_gpu():
        assert (true.argmax(-1) == ours.argmax(-1)).all()
        np.testing.assert_allclose(ours, true, atol=5e-3)


def test_it_skips_most_of_qk_and_stays_near_to_dense(model, tokenizer, delta):
    length, first = 2048, 1536
    ids = prompt_ids(tokenizer, read_text(BUNDLED_TEXT), length)
    logs = []
    for setting in (DENSE, delta):
        caches = setting.make_caches(model, length)
        setting.prefill(model, ids[:first], caches, 512)
        logits = setting.forward(model, ids[first:], caches)
        mx.eval(logits)
        logs.append(log_softmax(logits))
    figures = measure_sparsity(caches, length)
    loss = divergence(*logs).mean()
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).mean()
    print(f"sparsity {figures.prefill:.3f}, KL {loss:.5f}, top-1 {same:.3f}")
    assert figures.prefill >= 0.6
    assert 0 < loss <= 0.0015 and same >= 0.96


def needles(tokenizer) -> tuple[list[int], list[tuple[list[int], str]]]:
    """A chat in which four numbers are told within prose, and one of them is asked for.

    Returns:
        The tokens that all questions share, and each question's own with its answer.
    """
    rng, prose = random.Random(1), read_text(BUNDLED_TEXT)
    numbers = [str(rng.randrange(10_000, 99_999)) for _ in CITIES]
    text = ""
    for i, (city, number) in enumerate(zip(CITIES, numbers, strict=True)):
        start = 20_000 + 1000 * i
        text += prose[start : start + 1000]
        text += f"\n\nThe special magic number for {city} is: {number}.\n\n"
    text += prose[30_000:31_000]
    asked = [f"{text}\n\nWhat is the special magic number for {city}?" for city in CITIES]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        for content in asked
    ]
    shared = next(i for i, ids in enumerate(zip(*chats, strict=False)) if len(set(ids)) > 1)
    return chats[0][:shared], [(c[shared:], n) for c, n in zip(chats, numbers, strict=True)]


def test_needles_that_dense_attention_finds_are_found(model, tokenizer, delta):
    shared, questions = needles(tokenizer)
    assert len(shared) > 1000
    found = {}
    for setting in (DENSE, delta):
        caches = setting.make_caches(model, len(shared))
        setting.prefill(model, shared, caches, 512)
        found[setting.name] = [
            says(number, model, tokenizer, setting, copy.deepcopy(caches), ids)
            for ids, number in questions
        ]
        # What dense attention does not find says nothing of the delta.
        questions = [q for q, right in zip(questions, found[setting.name], strict=True) if right]
    print(found)
    assert sum(found["dense"]) >= 2
    assert all(found["delta"])


def says(
    number: str, model, tokenizer, setting: Setting, caches: list[Any], ids: list[int]
) -> bool:
    """Whether the greedy answer has a number in its first twenty tokens."""
    out: list[int] = []
    while len(out) < 20 and number not in tokenizer.decode(out):
        logits = setting.forward(model, ids, caches)[-1]
        ids = [int(mx.argmax(logits))]
        out += ids
    return number in tokenizer.decode(out)
