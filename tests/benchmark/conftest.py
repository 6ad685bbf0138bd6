"""A small model and a text, for what is timed."""

from __future__ import annotations

import pytest

from tests.tiny import llama_model, tokens


@pytest.fixture(scope="module")
def model():
    """With heads that every way to store keys takes."""
    return llama_model(head_dim=64)


@pytest.fixture(scope="module")
def ids():
    """A text's tokens."""
    return tokens(400)[0].tolist()
