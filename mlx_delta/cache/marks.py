"""Places in a text to go back to exactly, however far the text has gone on since.

Further back than a block the full keys of the window are gone, and with them the way back
(:meth:`HeldKeys.exact_length`). A mark keeps those that the next token would need: a window and a
block at most. All that lies before them is stored or held, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .check_state import leaves
from .held import HeldKeys


@dataclass(frozen=True)
class Mark:
    """A place in a text.

    Attributes:
        length: Tokens before it.
        near: For each cache the full keys, and values, that end there; ``None`` for one that needs
            none.
    """

    length: int
    near: list[list[mx.array] | None]

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(x.nbytes for arrays in self.near for x in arrays or ())


def mark(caches: Sequence[object]) -> Mark | None:
    """Mark the end of the text in a model's caches; ``None`` where a cache can't be taken back.

    Args:
        caches: Of a single text.
    """
    found: list[list[mx.array] | None] = []
    length = None
    for cache in leaves(caches):
        if isinstance(cache, HeldKeys):
            if len(cache.lengths) != 1 or cache.config.block_fraction is not None:
                return None
            if cache.config.max_size is not None:
                return None  # what is dropped later does not come back
            found.append(cache.near_arrays())
            length = cache.lengths[0]
        elif not cache.is_trimmable():
            return None
        else:
            found.append(None)
            length = cache.size() if length is None else length
    mx.eval([x for arrays in found for x in arrays or ()])
    return None if length is None else Mark(length, found)


def go_to(caches: Sequence[object], place: Mark) -> bool:
    """Take caches back to a mark; false, and nothing changed, where one can't be taken back.

    Args:
        caches: Those that were marked; the text up to there must be the same still.
        place: The mark.
    """
    found = leaves(caches)
    if not all(isinstance(cache, HeldKeys) or cache.is_trimmable() for cache in found):
        return False
    for cache, near in zip(found, place.near, strict=True):
        if isinstance(cache, HeldKeys):
            cache.return_to(place.length, near)
        else:
            cache.trim(cache.size() - place.length)
    return True
