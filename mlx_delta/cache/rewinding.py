"""Going back in a text exactly, over all layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .check_state import leaves, length_of
from .held import HeldKeys


def rewind(caches: Sequence[Any], n: int) -> int:
    """Take back at least the last ``n`` tokens, to where the text can go on exactly.

    Args:
        caches: The caches of a model, one per layer, with a single text; held keys or mlx-lm's.
        n: Tokens to take back.

    Returns:
        How many tokens more than ``n`` were taken back. They are to be fed again, before what
        follows: then everything is as if the last ``n`` had never been there.

    Raises:
        ValueError: A cache can't be rewound (a sliding window that is full), or is of a batch
            whose rows can't be rewound by ``n``. Nothing is changed then.
    """
    caches = leaves(caches)
    length = length_of(caches)
    wanted = max(0, length - n)
    if wanted == length:
        return 0
    fixed = [cache for cache in caches if not cache.is_trimmable()]
    if fixed:
        raise ValueError(
            f"[rewind] a {type(fixed[0]).__name__} of {length} tokens can't be rewound; make new "
            "caches and feed the text again."
        )
    target = reachable(caches, wanted)
    held = [cache for cache in caches if isinstance(cache, HeldKeys)]
    if target < wanted and any(len(cache.lengths) > 1 for cache in held):
        raise ValueError(f"[rewind] the rows of a batch can't be taken back by {n} tokens exactly.")
    for cache in caches:
        cache.trim(length - target)
    return wanted - target


def reachable(caches: Sequence[Any], length: int) -> int:
    """The largest length, up to this one, to which :func:`rewind` can go back."""
    held = [cache for cache in leaves(caches) if isinstance(cache, HeldKeys)]
    while (lowest := min([length, *(cache.exact_length(length) for cache in held)])) < length:
        length = lowest
    return length
