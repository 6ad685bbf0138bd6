"""The bundled demo models: they remember with the delta, and only because far keys are there.

At 1,000 to 1,500 tokens, which take seconds; their model cards have the figures of 2,048 to 16,384.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_delta import load
from mlx_delta.evaluate.recall import RecallOptions, RecallTask, measure_sample, summarize_recall
from mlx_delta.generate.command import main
from mlx_delta.measure.settings import parse_settings
from mlx_delta.measure.text import BUNDLED_TEXT, read_text

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = ["demo", "demo-bitnet"]


def answer(capsys, model: str, *flags: str) -> dict:
    """What the command says, as its JSON."""
    assert main(["--model", model, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def answer_to_memory(capsys, model: str, *flags: str) -> dict:
    """What it says to the bundled prompt: 1,500 tokens, a password near its start."""
    return answer(capsys, model, "--prompt-file", str(EXAMPLES / "memory.txt"), "-m", "8", *flags)


@pytest.mark.parametrize("model", MODELS)
def test_a_fact_from_a_thousand_tokens_back_is_answered(capsys, model):
    values = answer_to_memory(capsys, model)
    assert values["text"].startswith("silver king.")
    assert values["prompt_tokens"] > 1400 and values["prefill_sparsity"] >= 0.55


@pytest.mark.parametrize("model", MODELS)
def test_with_the_far_keys_dropped_it_is_not(capsys, model):
    values = answer_to_memory(capsys, model, "--no-delta", "--max-kv-size", "128")
    assert not values["text"].startswith("silver king")


@pytest.mark.parametrize("model", MODELS)
def test_it_writes_english_words(capsys, model):
    prompt = ["--prompt", "It was a dark night, and the old man", "-m", "60"]
    values = answer(capsys, model, *prompt, "--temp", "0.7", "--seed", "1")
    words = re.findall(r"[a-z]+", values["text"].lower())
    known = set(re.findall(r"[a-z]+", read_text(BUNDLED_TEXT).lower()))
    assert len(words) > 30 and len(set(words)) > 10
    assert sum(word in known for word in words) > 0.8 * len(words)


@pytest.mark.parametrize("name", MODELS)
def test_recall_needs_the_far_keys_and_survives_holding_them(name):
    model, tokenizer = load(name)
    options = RecallOptions(answers=3, length=1024, distances=(300, 900))  # of two wordings each
    task = RecallTask(tokenizer, read_text(BUNDLED_TEXT), options)
    recall = {}
    for setting in parse_settings(["dense", "delta", "window-only"], model.args.delta):
        records = [measure_sample(model, setting, task, *sample) for sample in task.samples]
        recall[setting.kind] = summarize_recall(records)
    assert recall["dense"]["score"] >= 0.95
    assert recall["delta"]["score"] >= recall["dense"]["score"] - 0.03
    assert recall["window-only"]["score"] <= 0.3
    assert recall["delta"]["prefill_sparsity"] > 0.5
