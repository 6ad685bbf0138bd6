"""Words that messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what was meant by an unknown word; empty where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.4)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
