"""The key-value cache of hybrid delta attention: held keys far away, full keys near.

:class:`DeltaKVCache` fulfils mlx-lm's cache contract for one text (or several of equal length);
its twin for ragged batches is in ``batch_cache.py``. What they share is :class:`_HeldKeys`.

Positions count from the start of a row's own text, so token ``t`` of every row lies at index
``t`` of the buffers, whatever padding the batch came with. One buffer serves both kinds of keys:
a block is encoded, in place, once no later query's window reaches it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import _BaseCache

from .config import DeltaConfig
from .hold import hold_blocks

STATE_VERSION = 1

# A row index: every row, or some of them.
Rows = slice | mx.array


@dataclass(frozen=True)
class HybridKeys:
    """What an update leaves for attention to read.

    Attributes:
        held: [B, Hkv, capacity, D]; held keys in every block that is far from the last query.
        full: [B, Hkv, capacity, D]; full keys in every block that is near to the first query.
        values: [B, Hkv, capacity, Dv].
        starts: Position of each row's first query; one entry when all rows agree.
        length: Keys to look at, over all rows: one more than the last query's position.
        block_size: Tokens in a block.
        window_blocks: Blocks before a query's own that stay exact.
    """

    held: mx.array
    full: mx.array
    values: mx.array
    starts: tuple[int, ...]
    length: int
    block_size: int
    window_blocks: int


class _HeldKeys(_BaseCache):
    """Buffers of keys, values and counts of zeros, and the encoding of finished blocks.

    Subclasses say how many rows there are. ``_lengths`` and ``_encoded`` (tokens, and encoded
    blocks) have one entry per row, or a single one where all rows agree.
    """

    step = 256  # tokens by which the buffers grow, as in mlx-lm

    def __init__(self, config: DeltaConfig | None = None):
        self.config = config or DeltaConfig()
        # mx.array, or None before the first update.
        self.keys: Any = None
        self.values: Any = None
        self.zeros: Any = None  # [B, Hkv, blocks], zero deltas of encoded blocks
        # Full keys of the last encoded block, [B, Hkv, block_size, D]: one block of slack, so
        # that rewinding by up to a block is exact.
        self._spare: Any = None
        self._spare_valid: list[bool] = [False]
        self._lengths: list[int] = [0]
        self._encoded: list[int] = [0]

    # Reading and writing.

    @property
    def offset(self) -> Any:
        """Position of the next token: an int, or for a batch one per row, [B]."""
        raise NotImplementedError

    def update(self, keys: mx.array, values: mx.array) -> HybridKeys:
        """Append keys [B, Hkv, L, D] and values [B, Hkv, L, Dv] to every row."""
        steps = keys.shape[2]
        if self.config.block_fraction is not None:
            self.config = self.config.resolve(steps)
        starts = tuple(self._lengths)
        length = max(starts) + steps
        self._reserve(keys, values, length)
        self._write(keys, values)
        full = self.keys[...]  # a handle of its own: encoding replaces blocks in place
        targets = self._far_blocks([end - 1 for end in self._ends(steps)])
        self._lengths = [start + steps for start in starts]
        self._encode(targets)
        return HybridKeys(
            held=self.keys,
            full=full,
            values=self.values,
            starts=starts,
            length=length,
            block_size=self.config.block_size,
            window_blocks=self.config.window_blocks,
        )

    def _ends(self, steps: int) -> list[int]:
        """The end of each row's text after ``steps`` more tokens."""
        return [length + steps for length in self._lengths]

    def _far_blocks(self, positions: list[int]) -> list[int]:
        """How many blocks a query at each position sees as held ones."""
        block_size, window_blocks = self.config.block_size, self.config.window_blocks
        return [max(0, position // block_size - window_blocks) for position in positions]

    def _reserve(self, keys: mx.array, values: mx.array, length: int) -> None:
        """Make room for ``length`` tokens."""
        capacity = 0 if self.keys is None else self.keys.shape[2]
        if length <= capacity:
            return
        grown = -(-length // self.step) * self.step
        B, H = keys.shape[:2]
        blocks = -(-grown // self.config.block_size)
        self.keys = _grow(self.keys, (B, H, grown, keys.shape[3]), keys.dtype)
        self.values = _grow(self.values, (B, H, grown, values.shape[3]), values.dtype)
        self.zeros = _grow(self.zeros, (B, H, blocks), mx.int32)
        if self._spare is None:
            shape = (B, H, self.config.block_size, keys.shape[3])
            self._spare = mx.zeros(shape, keys.dtype)

    def _write(self, keys: mx.array, values: mx.array) -> None:
        """Put new tokens at each row's own position; those before position 0 are padding."""
        steps = keys.shape[2]
        if len(set(self._lengths)) == 1:
            start = self._lengths[0]
            skip = max(0, -start)
            self.keys[..., start + skip : start + steps, :] = keys[..., skip:, :]
            self.values[..., start + skip : start + steps, :] = values[..., skip:, :]
        elif steps == 1 and min(self._lengths) >= 0:
            index = mx.array(self._lengths)[:, None, None, None]
            self.keys = mx.put_along_axis(self.keys, index, keys, axis=2)
            self.values = mx.put_along_axis(self.values, index, values, axis=2)
        else:
            for row, start in enumerate(self._lengths):
                skip = max(0, -start)
                if skip < steps:
                    self.keys[row, :, start + skip : start + steps] = keys[row, :, skip:]
                    self.values[row, :, start + skip : start + steps] = values[row, :, skip:]

    def _encode(self, targets: list[int]) -> None:
        """Encode each row up to its target block; blocks are only ever encoded once."""
        for (encoded, target), rows in _equal_rows(self._encoded, targets).items():
            if target <= encoded:
                continue
            start, end = encoded * self.config.block_size, target * self.config.block_size
            keys = self.keys[rows, :, start:end]
            previous = None
            if not self.config.keyframes and start:
                previous = self.keys[rows, :, start - 1]
            held, zeros = hold_blocks(keys, self.config, encoded, previous)
            self._spare[rows] = keys[:, :, -self.config.block_size :]
            self.keys[rows, :, start:end] = held
            self.zeros[rows, :, encoded:target] = zeros
        for row, target in enumerate(targets):
            if target > self._encoded[row]:
                self._encoded[row] = target
                self._spare_valid[row] = True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append, and return keys and values for attention code that knows nothing of deltas.

        Exact for one query. For several the window is the first query's, so that later ones see
        a few more full keys than they need; :func:`mlx_delta.attention.delta_attention` gives
        every query its own window.
        """
        view = self.update(keys, values)
        first_block = min(view.starts) // view.block_size - view.window_blocks
        near = max(0, first_block) * view.block_size
        if keys.shape[2] == 1 or near == 0:
            fetched = view.held if keys.shape[2] == 1 else view.full
            return fetched[..., : view.length, :], view.values[..., : view.length, :]
        fetched = mx.concatenate(
            [view.held[..., :near, :], view.full[..., near : view.length, :]], axis=2
        )
        return fetched, view.values[..., : view.length, :]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys (held far away, full near) and values of all tokens so far."""
        length = self.size()
        return self.keys[..., :length, :], self.values[..., :length, :]

    # Rewinding.

    def is_trimmable(self) -> bool:
        """Always: see :meth:`trim` for what is exact."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every row; returns how many were forgotten.

        Exact for up to ``block_size`` tokens between two updates. Further back the full keys are
        gone, and the held ones stand in for them.
        """
        n = max(0, min(self.size(), n))
        self._lengths = [length - n for length in self._lengths]
        block_size = self.config.block_size
        # The blocks in the next query's window have to hold full keys again.
        targets = self._far_blocks(self._lengths)
        groups = _equal_rows(self._encoded, targets, self._spare_valid)
        for (encoded, target, spare_valid), rows in groups.items():
            if target < encoded and spare_valid:
                start = (encoded - 1) * block_size
                self.keys[rows, :, start : start + block_size] = self._spare[rows]
        for row, target in enumerate(targets):
            if target < self._encoded[row]:
                self._encoded[row] = target
                self._spare_valid[row] = False
        return n

    # Bookkeeping.

    def size(self) -> int:
        """Tokens in the longest row."""
        return max(0, *self._lengths) if self._lengths else 0

    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        buffers = (self.keys, self.values, self.zeros, self._spare)
        return sum(x.nbytes for x in buffers if x is not None)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that mlx-lm's dense cache would have allocated for as many tokens."""
        if self.keys is None:
            return 0
        B, H, _, head_dim = self.keys.shape
        tokens = -(-self.size() // self.step) * self.step
        per_token = head_dim * self.keys.itemsize + self.values.shape[3] * self.values.itemsize
        return B * H * tokens * per_token

    @property
    def state(self) -> list[Any]:
        """Everything needed to go on: a JSON header and the buffers."""
        header = {
            "version": STATE_VERSION,
            "config": self.config.to_dict(),
            "lengths": self._lengths,
            "encoded": self._encoded,
            "spare_valid": self._spare_valid,
        }
        return [json.dumps(header), self.keys, self.values, self.zeros, self._spare]

    @state.setter
    def state(self, state: Any) -> None:
        name = type(self).__name__
        try:
            header, keys, values, zeros, spare = state
            header = json.loads(header)
            version = header["version"]
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"[{name}] not a saved state of this cache: {error}.") from error
        if version != STATE_VERSION:
            raise ValueError(
                f"[{name}] saved state has version {version} but this library reads version "
                f"{STATE_VERSION}; make the prompt cache anew."
            )
        self.config = DeltaConfig.from_dict(header["config"])
        self._lengths = header["lengths"]
        self._encoded = header["encoded"]
        self._spare_valid = header["spare_valid"]
        self.keys, self.values, self.zeros, self._spare = keys, values, zeros, spare
        self._check_state(name)

    def _check_state(self, name: str) -> None:
        """Refuse a state whose counts and buffers do not fit together."""
        counts = {len(self._lengths), len(self._encoded), len(self._spare_valid)}
        if len(counts) != 1:
            raise ValueError(f"[{name}] saved state has counts for different numbers of rows.")
        buffers = (self.keys, self.values, self.zeros, self._spare)
        if all(x is None for x in buffers):
            return
        if any(not isinstance(x, mx.array) for x in buffers):
            raise ValueError(f"[{name}] saved state lacks one of its buffers.")
        B, H, capacity, head_dim = self.keys.shape
        block_size = self.config.block_size
        expected = {
            "values": (self.values.shape[:3], (B, H, capacity)),
            "zeros": (self.zeros.shape, (B, H, -(-capacity // block_size))),
            "spare": (self._spare.shape, (B, H, block_size, head_dim)),
        }
        for what, (shape, wanted) in expected.items():
            if tuple(shape) != wanted:
                raise ValueError(f"[{name}] saved {what} have shape {shape}, expected {wanted}.")
        for length, encoded in zip(self._lengths, self._encoded, strict=True):
            if length > capacity or not 0 <= encoded * block_size <= max(0, length):
                raise ValueError(
                    f"[{name}] saved state counts {length} tokens and {encoded} encoded blocks "
                    f"in a buffer of {capacity} tokens."
                )


class DeltaKVCache(_HeldKeys):
    """Cache of one layer for one text, or for several texts of equal length.

    Args:
        config: The setting of this layer; the default one when not given.
    """

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

    @classmethod
    def merge(cls, caches: list[DeltaKVCache]) -> Any:
        """A batch cache with one row for each of these caches."""
        from .batch_cache import BatchDeltaKVCache

        return BatchDeltaKVCache.merge(caches)


def _grow(buffer: mx.array | None, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A buffer of this shape that starts with what the old one held; longer on axis 2 only."""
    if buffer is None:
        return mx.zeros(shape, dtype)
    room = (*shape[:2], shape[2] - buffer.shape[2], *shape[3:])
    return mx.concatenate([buffer, mx.zeros(room, buffer.dtype)], axis=2)


def _equal_rows(*counts: Sequence[int]) -> dict[tuple[int, ...], Rows]:
    """Rows that agree in all counts, to be worked on together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(zip(*counts, strict=True)):
        groups.setdefault(key, []).append(row)
    if len(groups) == 1:
        return {key: slice(None) for key in groups}
    return {key: mx.array(rows) for key, rows in groups.items()}
