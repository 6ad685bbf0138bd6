"""Names of blocks: a hash of the model, the setting and all tokens up to the block's end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any


def root(identity: str, layout: str) -> str:
    """The name of a text without tokens."""
    return hashlib.sha256(f"mlx_delta prefix 1\n{identity}\n{layout}".encode()).hexdigest()


def after(name: str, tokens: Sequence[Any]) -> str:
    """The name of a text that goes on with these tokens."""
    # As text: mlx-lm's tokens may be of other kinds than whole numbers, for images.
    return hashlib.sha256(f"{name}\n{','.join(map(repr, tokens))}".encode()).hexdigest()


def names(start: str, tokens: Sequence[Any], size: int) -> Iterator[str]:
    """The names of a text's whole blocks, that of the text without tokens first."""
    yield start
    for end in range(size, len(tokens) + 1, size):
        start = after(start, tokens[end - size : end])
        yield start


def in_common(tokens: Sequence[Any], others: Sequence[Any]) -> int:
    """How many of the first tokens are the same."""
    for i, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return i
    return min(len(tokens), len(others))
