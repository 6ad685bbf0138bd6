"""The bundled demo model: it remembers with the delta, and only because far keys are there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mlx_delta import load
from mlx_delta.generate.command import main

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """examples/demo_figures.py as a module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("demo_figures", EXAMPLES / "demo_figures.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def answer(capsys, *flags: str) -> dict:
    """What the command says to the bundled prompt: 1,500 tokens, a password near its start."""
    prompt = str(EXAMPLES / "memory.txt")
    assert main(["--prompt-file", prompt, "-m", "8", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_fact_from_a_thousand_tokens_back_is_answered(capsys):
    values = answer(capsys)
    assert values["text"].startswith("silver king.")
    assert values["prompt_tokens"] > 1400 and values["prefill_sparsity"] >= 0.55


def test_with_the_far_keys_dropped_it_is_not(capsys):
    values = answer(capsys, "--no-delta", "--max-kv-size", "128")
    assert not values["text"].startswith("silver king")


@pytest.mark.parametrize("template", ["direct", "password"])
def test_recall_needs_the_far_keys_and_survives_holding_them(figures, template):
    model, tokenizer = load()
    text = figures.read_text(figures.TEXT)
    prose = np.array(tokenizer.encode(text, add_special_tokens=False))
    measured = figures.measure_recall(model, tokenizer, prose, 1024, 60, template)
    dense, delta, dropped = (measured[name][0] for name in ("dense", "delta", "far keys dropped"))
    assert dense >= 0.95 and delta >= dense - 0.03 and dropped <= 0.3
    assert measured["delta"][2] > 0.5
