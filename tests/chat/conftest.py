"""Tiny models to talk to: one with a chat template, one without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_delta
from mlx_delta.chat import Conversation, Options
from tests.tiny import SMALL, write_llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# head_dim=32 for packed keys; 256 tokens, one for each byte, so that answers cut characters.
BYTES = {"vocab_size": 256, "hidden_size": 64, "head_dim": 32, "tie_word_embeddings": True}
SETTINGS = {
    "full": SMALL,
    "packed4": dataclasses.replace(SMALL, key_bits=4, value_bits=4),
}


def set_template(path: Path, template: str) -> None:
    """Give a model directory a chat template."""
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


@pytest.fixture(scope="package")
def plain_path(tmp_path_factory) -> Path:
    path = write_llama(tmp_path_factory.mktemp("models") / "plain", **BYTES)
    say_letters(path)
    return path


@pytest.fixture(scope="package")
def words_path(tmp_path_factory) -> Path:
    """Of the demo's tokens, so that nearly each of them can be shown when it comes."""
    return write_words(tmp_path_factory.mktemp("models") / "words")


def write_words(path: Path) -> Path:
    write_llama(path, hidden_size=64, head_dim=32)
    set_template(path, TEMPLATE)
    return path


@pytest.fixture(scope="package")
def template_path(tmp_path_factory) -> Path:
    path = write_llama(tmp_path_factory.mktemp("models") / "chat", **BYTES)
    set_template(path, TEMPLATE)
    say_letters(path)
    return path


def say_letters(path: Path) -> None:
    """Make a model say printable ASCII only: what else it says has no text to be compared."""
    _, tokenizer = mlx_delta.load(path)
    said = [tokenizer.decode([token]) for token in range(BYTES["vocab_size"])]
    letters = [len(text) == 1 and text.isascii() and text.isprintable() for text in said]
    ends = tokenizer.eos_token_ids
    quiet = [1.0 if letter and i not in ends else 0.001 for i, letter in enumerate(letters)]
    weights = mx.load(str(path / "model.safetensors"))
    name = "model.embed_tokens.weight"  # the head as well
    weights[name] = weights[name] * mx.array(quiet, weights[name].dtype)[:, None]
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})


@pytest.fixture(scope="package", params=SETTINGS)
def loaded(request, template_path):
    return mlx_delta.load(template_path, SETTINGS[request.param])


@pytest.fixture(scope="package")
def default(template_path):
    return mlx_delta.load(template_path, SMALL)


@pytest.fixture
def talk():
    """A conversation of short answers with a loaded model."""

    def begin(loaded, **options) -> Conversation:
        drawn = Options(**{"max_tokens": 12, **options.pop("drawn", {})})
        return Conversation(*loaded, options=drawn, **options)

    return begin
