"""Taking the caches of several models back in their common text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_delta.cache import length_of, rewind


def go_back(groups: Sequence[list[Any]], length: int) -> int | None:
    """Take the caches of several models back to one length of their common text, exactly.

    Args:
        groups: The caches of each model; a model without any is left out.
        length: How much of the text to keep, at most.

    Returns:
        How much is kept: less, where a cache can't be cut at ``length`` exactly. ``None`` where
        one can't be taken back at all.
    """
    groups = [caches for caches in groups if caches]
    target = min([length, *map(length_of, groups)])
    settled = False
    while not settled:
        settled = True
        for caches in groups:
            extra = length_of(caches) - target
            if extra <= 0:
                continue
            try:
                further = rewind(caches, extra)
            except ValueError:
                return None
            if further:
                target, settled = target - further, False
    return target
