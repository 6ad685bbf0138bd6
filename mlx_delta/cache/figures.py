"""What a cache says of itself: how long its text is, what is held, and the bytes of both."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from mlx_delta.config import DeltaConfig

from .kinds import Keys, Values
from .store import KeyStore
from .written_out import WrittenOut


class CacheFigures(_BaseCache):
    """Figures of the stores, rows and positions of a cache.

    Attributes:
        config: The setting of this layer.
    """

    config: DeltaConfig
    _lengths: list[int]
    _encoded: list[int]
    _dropped: list[int]
    _sizes: list[int] | None  # of the blocks of each row, where they are not the setting's
    _keys: Keys | None
    _values: Values | None
    _written: WrittenOut

    step = 256  # tokens by which the buffers grow, as in mlx-lm

    # Kv heads, and dimensions of a key and a value; None before the first update.
    _model: tuple[int, int, int] | None = None
    _item_size = 0  # bytes of a number of the model's type
    # Queries before this position saw nothing held: the prompt's length was not known yet.
    _held_from = 0

    def size(self) -> int:
        """Tokens in the longest row."""
        return max(0, *self._lengths) if self._lengths else 0

    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._keys is None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(self._lengths)

    @property
    def encoded(self) -> tuple[int, ...]:
        """Blocks of each row that are held."""
        return tuple(self._encoded)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Blocks of each row that are gone, after the first that always stay."""
        return tuple(self._dropped)

    @property
    def block_sizes(self) -> list[int]:
        """Tokens in a block of each row."""
        return self._sizes or [self.config.block_size] * len(self._lengths)

    @property
    def held_from(self) -> int:
        """Position of the first query that could see held keys; 0 unless a prompt was awaited."""
        return self.size() if self.config.block_fraction is not None else self._held_from

    @property
    def zeros(self) -> mx.array:
        """Zero deltas of each encoded block that was not dropped, int32 [B, Hkv, blocks]."""
        return self._stored.zeros

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self._shape[0]

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return self._shape[1]

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        return self._shape[2]

    @property
    def _stored(self) -> KeyStore:
        if self._keys is None:
            raise ValueError(f"[{type(self).__name__}] the cache is empty.")
        return self._keys

    @property
    def _shape(self) -> tuple[int, int, int]:
        if self._model is None:
            raise ValueError(f"[{type(self).__name__}] the cache is empty.")
        return self._model

    @property
    def kept_tokens(self) -> int:
        """Tokens of the first row that were not dropped."""
        return self._lengths[0] - self._dropped[0] * self.config.block_size

    @property
    def seen_tokens(self) -> int:
        """Tokens of the first row that its last query sees."""
        return self.kept_tokens

    def read_bytes(self, float_bytes: int | None = None) -> int:
        """Bytes of keys and values that the first row's last query reads.

        Args:
            float_bytes: Count floats at this size at most, whatever they are stored in.
        """
        tokens, far = self.seen_tokens, self._encoded[0] - self._dropped[0]
        values = 0
        if self._values is not None:
            coded = far * self.config.block_size
            values = self._values.read_bytes(tokens, coded, float_bytes)
        return self._stored.read_bytes(tokens, far, float_bytes) + values

    def far_bytes(self, float_bytes: int) -> tuple[int, int]:
        """Bytes of the first row's far tokens, everything that is stored for them counted.

        Args:
            float_bytes: Count floats at this size at most, whatever they are stored in.

        Returns:
            These, and what they would take as such floats; 0 and 0 where no token is far.
        """
        far = self._encoded[0] - self._dropped[0] if self._model is not None else 0
        if self._values is None or not far:
            return 0, 0
        tokens = far * self.config.block_size
        own = self._stored.read_bytes(tokens, far, float_bytes)
        own += self._values.read_bytes(tokens, tokens, float_bytes)
        heads, head_dim, value_dim = self._shape
        size = min(float_bytes, self._item_size)
        return own, tokens * heads * (head_dim + value_dim) * size

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return self.key_nbytes + self.value_nbytes

    @property
    def key_nbytes(self) -> int:
        """Bytes allocated for keys: everything but the values."""
        return 0 if self._keys is None else self._keys.nbytes

    @property
    def value_nbytes(self) -> int:
        """Bytes allocated for values."""
        return 0 if self._values is None else self._values.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of what is kept written out between tokens, where no kernel reads stored keys.

        No part of ``nbytes``: it is bounded, made anew when it is needed, and never saved.
        """
        return self._written.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that mlx-lm's dense cache would have allocated for as many tokens."""
        if self._model is None:
            return 0
        heads, head_dim, value_dim = self._model
        tokens = -(-self.size() // self.step) * self.step
        return len(self._lengths) * heads * tokens * (head_dim + value_dim) * self._item_size
