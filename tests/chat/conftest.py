"""Tiny models to talk to: one with a chat template, one without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mlx_delta
from mlx_delta.chat import Conversation, Options
from tests.tiny import SMALL, write_llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# head_dim=32 for coded values; 256 tokens, one for each byte, so that answers cut characters.
BYTES = {"vocab_size": 256, "hidden_size": 64, "head_dim": 32, "tie_word_embeddings": True}
SETTINGS = {
    "full": SMALL,
    "deltas": SMALL.changed(level=0.03, key_bits=4, value_bits=4),
}


def set_template(path: Path, template: str) -> None:
    """Give a model directory a chat template."""
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


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
    return path


@pytest.fixture(scope="package", params=SETTINGS)
def loaded(request, words_path):
    return mlx_delta.load(words_path, SETTINGS[request.param])


@pytest.fixture(scope="package")
def default(words_path):
    return mlx_delta.load(words_path, SMALL)


@pytest.fixture
def talk():
    """A conversation of short answers with a loaded model."""

    def begin(loaded, **options) -> Conversation:
        drawn = Options(**{"max_tokens": 8, **options.pop("drawn", {})})
        return Conversation(*loaded, options=drawn, **options)

    return begin
