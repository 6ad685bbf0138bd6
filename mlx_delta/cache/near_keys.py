"""Full keys of the last tokens: of the block being filled, the window, and one block of slack.

Or full values, where those further back are codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_delta.config import DeltaConfig

from .buffers import grow, pad_to, write_tokens


class NearKeys:
    """A buffer of the last keys of each row.

    Args:
        keys: [B, Hkv, room, D] of the storage type; key ``firsts[b] + i`` of row b at index i.
        firsts: Position of each row's first key.
    """

    def __init__(self, keys: mx.array, firsts: list[int]):
        self.keys = keys
        self.firsts = firsts

    @classmethod
    def make(cls, config: DeltaConfig, keys: mx.array, dtype: mx.Dtype) -> NearKeys:
        """Empty, for keys of this shape: the window, the block being filled, and slack."""
        B, H, _, D = keys.shape
        room = (config.window_blocks + 2) * config.block_size
        return cls(mx.zeros((B, H, room, D), dtype), [0] * B)

    @property
    def room(self) -> int:
        """Keys that are kept between two updates."""
        return self.keys.shape[2]

    def written(self, new: mx.array, starts: Sequence[int]) -> mx.array:
        """The buffer with new keys [B, Hkv, L, D] in it, longer if need be; ours stays as it is."""
        B, H, room, D = self.keys.shape
        places = [start - first for start, first in zip(starts, self.firsts, strict=True)]
        near = self.keys[...]  # a handle of its own: an earlier step may still read the old one
        near = grow(near, (B, H, max(places) + new.shape[2], D), near.dtype)
        return write_tokens(near, new, places)

    def keep(self, near: mx.array, firsts: Sequence[int]) -> None:
        """Take over what was written, from these positions on (never before the old ones)."""
        firsts = [max(old, new) for old, new in zip(self.firsts, firsts, strict=True)]
        shifts = [new - old for new, old in zip(firsts, self.firsts, strict=True)]
        room = self.room
        if near.shape[2] < max(shifts) + room:
            near = pad_to(near, max(shifts) + room)
        if not any(shifts) and near.shape[2] == room:
            self.keys = near
            return
        if len(set(shifts)) == 1:
            near = near[:, :, shifts[0] : shifts[0] + room]
        else:
            index = mx.array(shifts)[:, None] + mx.arange(room)
            near = mx.take_along_axis(near, index[:, None, :, None], axis=2)
        # Contiguous: a slice would keep all of a chunk's keys in memory.
        self.keys, self.firsts = mx.contiguous(near), firsts

    def rewind(self, firsts: Sequence[int]) -> None:
        """Begin no later than at these positions; keys from there on are written again."""
        self.firsts = [min(old, new) for old, new in zip(self.firsts, firsts, strict=True)]

    # Rows.

    def blank(self, rows: int) -> NearKeys:
        """Without tokens."""
        return NearKeys(mx.zeros((rows, *self.keys.shape[1:]), self.keys.dtype), [0] * rows)

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        self.keys = self.keys[mx.array(rows, mx.int32)]
        self.firsts = [self.firsts[row] for row in rows]

    def row(self, index: int) -> NearKeys:
        """One row."""
        one = slice(index, index + 1)
        return NearKeys(mx.contiguous(self.keys[one]), self.firsts[one])

    @classmethod
    def join(cls, parts: Sequence[NearKeys]) -> NearKeys:
        """The rows of all parts."""
        keys = mx.concatenate([part.keys for part in parts])
        return cls(keys, [first for part in parts for first in part.firsts])
