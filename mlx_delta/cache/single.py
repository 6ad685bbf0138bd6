"""The key-value cache of hybrid delta attention for one text: held keys far away, full keys near.

:class:`DeltaKVCache` fulfils mlx-lm's cache contract; its twin for ragged batches is in ``batch``.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from .held import HeldKeys
from .written_out import WrittenOut


class DeltaKVCache(HeldKeys):
    """Cache of one layer for one text, or for several texts of equal length.

    Args:
        config: The setting of this layer; the default one when not given.
    """

    _any_rows = True
    # The class of batches, which is made of caches of this one: it enters itself here.
    batch_class: ClassVar[Any]

    @property
    def offset(self) -> int:
        """Tokens so far: the position of the next one."""
        return self._lengths[0]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The causal mask for the next ``N`` tokens, in the forms mlx-lm's attention takes."""
        if window_size is not None:
            return create_causal_mask(N, self.offset, window_size=window_size)
        if N == 1:
            return None
        return create_causal_mask(N, self.offset) if return_array else "causal"

    def compact(self) -> DeltaKVCache:
        """The same cache without room to grow, to be kept; itself where it has several rows."""
        if self._keys is None or self._values is None or len(self._lengths) != 1:
            return self
        cache = copy.copy(self)
        cache._written = WrittenOut()
        length = max(1, self.kept_tokens)
        cache._keys, cache._values = self._keys.row(0, length), self._values.row(0, length)
        return cache

    @classmethod
    def merge(cls, caches: list[DeltaKVCache]) -> Any:
        """A batch cache with one row for each of these caches."""
        return cls.batch_class.merge(caches)
