"""Values turned and stored as codes far away, full near: the same tokens as of keys.

The layout is specified in :mod:`mlx_delta.method.values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.method.values import value_group, value_words
from mlx_delta.ops.blocks import encode_values
from mlx_delta.ops.join import join_near
from mlx_delta.ops.storage import LARGEST, storage_type, to_storage
from mlx_delta.ops.turned import Codes, decode_values
from mlx_delta.widths import share_value_bits

from .buffers import equal_rows, grow, pad_to, take_out, write_first
from .near_keys import NearKeys
from .store import float_size, spread, token_bytes

STEP = 256  # tokens by which codes grow


class TurnedValues:
    """The values of a layer: codes far away, full ones near. A ``ValueStore`` of another kind.

    Args:
        config: The setting of this layer.
        head_dim: Dv.
        codes: Words and scales, each of [B, 1, capacity, ..], of far tokens.
        near: The last values.
        sinks: [B, Hkv, n_sinks, Dv], exact values of the first tokens. Most of the attention is
            often theirs, so that an error of theirs is not averaged away.
        counts: Blocks of each row that are coded.
    """

    differs = True  # what a far query reads is not what a near one does

    def __init__(
        self,
        config: DeltaConfig,
        head_dim: int,
        codes: Codes,
        near: NearKeys,
        sinks: mx.array,
        counts: list[int],
    ):
        self.config = config
        self.head_dim = head_dim
        self.codes = codes
        self.near = near
        self.sinks = sinks
        self.counts = counts
        self.widths = head_widths(config, near.keys.shape[1])

    @classmethod
    def make(cls, config: DeltaConfig, values: mx.array) -> TurnedValues:
        """An empty store for values of this shape and type."""
        B, H, _, D = values.shape
        dtype = storage_type(values.dtype)
        groups = H * D // value_group(D)
        words = sum(value_words(D, head_widths(config, H)))
        codes = (
            mx.zeros((B, 1, 0, words), mx.uint32),
            mx.zeros((B, 1, 0, groups), mx.uint8),
        )
        sinks = mx.zeros((B, H, config.sinks, D), dtype)
        return cls(config, D, codes, NearKeys.make(config, values, dtype), sinks, [0] * B)

    @staticmethod
    def check_new(config: DeltaConfig, values: mx.array) -> None:
        """Refuse values that can't be stored in this form.

        Raises:
            ValueError: Their type has no 16-bit form, or their dimension no groups; or the widths
                are of other values.
        """
        storage_type(values.dtype)
        value_group(values.shape[3])
        head_widths(config, values.shape[1])

    @staticmethod
    def count_arrays(config: DeltaConfig) -> int:
        """How many buffers a store of values has."""
        return 4

    @property
    def buffers(self) -> tuple[mx.array, ...]:
        """Words, scales, near values and those of the first tokens."""
        return (*self.codes, self.near.keys, self.sinks)

    @property
    def capacity(self) -> int:
        """Coded tokens that there is room for."""
        return self.codes[0].shape[2]

    def write(
        self, values: mx.array, starts: Sequence[int], capacity: int, targets: Sequence[int]
    ) -> TurnedView:
        """Put values [B, Hkv, L, Dv] at each row's own index, and code blocks up to ``targets``."""
        new = to_storage(values)
        near, firsts = self.near.written(new, starts), list(self.near.firsts)
        self.sinks = write_first(self.sinks, new, starts)
        size = self.config.block_size
        for (first, done, target), rows in equal_rows(firsts, self.counts, targets).items():
            if target <= done:
                continue
            self._reserve(target * size)
            span = slice(done * size - first, target * size - first)
            parts = encode_values(near[rows, :, span], self.widths)
            for buffer, part in zip(self.codes, parts, strict=True):
                buffer[rows, :, done * size : target * size] = part
        self.counts = [max(pair) for pair in zip(self.counts, targets, strict=True)]
        self.near.keep(near, [max(0, target - 1) * size for target in targets])
        return self._view(near, firsts, targets)

    def _reserve(self, tokens: int) -> None:
        room = -(-tokens // STEP) * STEP
        # Handles of their own: a step may still read the old ones.
        words, scales = (
            grow(x[...], (*x.shape[:2], room, x.shape[3]), x.dtype) for x in self.codes
        )
        self.codes = words, scales

    def _view(self, near: mx.array, firsts: Sequence[int], encoded: Sequence[int]) -> TurnedView:
        borders = tuple(n * self.config.block_size for n in encoded)
        where = tuple(firsts), borders
        return TurnedView(self.codes, near, self.sinks, *where, self.widths, self.head_dim)

    def fetch(self, length: int, encoded: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Values of the first tokens, [B, Hkv, length, Dv]: coded far away, full near."""
        return self._view(self.near.keys, self.near.firsts, encoded).held(length, dtype)

    def wait_for(self, other: mx.array) -> None:
        """Let the buffers be evaluated only together with another array."""
        words, scales, near, sinks = mx.depends(list(self.buffers), [other])
        self.codes, self.near.keys, self.sinks = (words, scales), near, sinks

    def drop(self, first: int, blocks: Sequence[int], size: int) -> None:
        """Take so many blocks of each row out, behind the first ones; what follows moves up."""
        room = self.capacity
        tokens = [n * size for n in blocks]
        words, scales = (pad_to(take_out(x, first * size, tokens), room) for x in self.codes)
        self.codes = words, scales
        self.near.firsts = [n - gone for n, gone in zip(self.near.firsts, tokens, strict=True)]
        self.counts = [n - gone for n, gone in zip(self.counts, blocks, strict=True)]

    def rewind(self, targets: Sequence[int]) -> None:
        """Forget that blocks from ``targets`` on are coded; they are still full."""
        self.near.rewind([target * self.config.block_size for target in targets])
        self.counts = [min(pair) for pair in zip(self.counts, targets, strict=True)]

    def full_values(self, first: int, length: int) -> mx.array:
        """Full values [1, Hkv, length - first, Dv] of a single text; an array of its own."""
        start = self.near.firsts[0]
        return mx.contiguous(self.near.keys[:, :, first - start : length - start])

    def refill(self, held: int, near: mx.array | None) -> None:
        """Of a single text, have so many coded blocks, after which ``near`` is full."""
        assert near is not None
        self.counts = [held]
        self.near = NearKeys(pad_to(near, self.near.room), [held * self.config.block_size])

    def read_bytes(self, tokens: int, far: int, float_bytes: int | None = None) -> int:
        """Bytes that a query reads of so many tokens, the first ``far`` of which are coded."""
        size = (tokens - far) * token_bytes(self.near.keys, float_bytes)
        if far:
            size += self.sinks[0].size * float_size(self.sinks, float_bytes)
        return size + far * sum(x.shape[3] * float_size(x, float_bytes) for x in self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.buffers)

    # Rows.

    def blank(self, rows: int) -> TurnedValues:
        """A store of this shape and type for so many rows without tokens."""
        near = self.near.keys
        return TurnedValues.make(self.config, mx.zeros((rows, *near.shape[1:]), near.dtype))

    def take(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        index = mx.array(rows, mx.int32)
        words, scales = (x[index] for x in self.codes)
        self.codes = words, scales
        self.near.take(rows)
        self.sinks = self.sinks[index]
        self.counts = [self.counts[row] for row in rows]

    def row(self, index: int, length: int) -> TurnedValues:
        """One row as a store of its own."""
        one, far = slice(index, index + 1), self.counts[index] * self.config.block_size
        words, scales = (mx.contiguous(x[one, :, :far]) for x in self.codes)
        codes = words, scales
        sinks, counts = mx.contiguous(self.sinks[one]), self.counts[one]
        return TurnedValues(self.config, self.head_dim, codes, self.near.row(index), sinks, counts)

    @classmethod
    def join(cls, stores: Sequence[Self]) -> TurnedValues:
        """The rows of all stores, padded to one length."""
        room = max(store.capacity for store in stores)
        parts = [[pad_to(x, room) for x in store.codes] for store in stores]
        words, scales = (mx.concatenate(list(x)) for x in zip(*parts, strict=True))
        return TurnedValues(
            stores[0].config,
            stores[0].head_dim,
            (words, scales),
            NearKeys.join([store.near for store in stores]),
            mx.concatenate([store.sinks for store in stores]),
            [n for store in stores for n in store.counts],
        )

    # State.

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {"value_firsts": self.near.firsts, "coded_values": self.counts}

    @classmethod
    def restore(
        cls, config: DeltaConfig, header: dict[str, Any], arrays: Sequence[Any]
    ) -> TurnedValues:
        """The store of a state, each buffer of which is as it should be."""
        words, scales, near, sinks = arrays
        head_dim = int(header["model"][2])
        if any(x.ndim != 4 for x in arrays):
            raise ValueError("saved values do not have the right dimensions")
        B, H = near.shape[:2]
        wanted = TurnedValues.make(config, mx.zeros((B, H, 1, head_dim), near.dtype))
        fits = near.dtype in LARGEST and near.shape == wanted.near.keys.shape
        fits &= sinks.dtype == near.dtype and sinks.shape == wanted.sinks.shape
        for buffer, own in zip(wanted.codes, (words, scales), strict=True):
            fits &= own.dtype == buffer.dtype and own.shape[:2] == buffer.shape[:2]
            fits &= own.shape[2:] == (words.shape[2], buffer.shape[3])
        counts, firsts = (spread(header[x], B) for x in ("coded_values", "value_firsts"))
        if not fits or len(counts) != B or len(firsts) != B:
            raise ValueError("saved values do not fit the setting or each other")
        return cls(config, head_dim, (words, scales), NearKeys(near, firsts), sinks, counts)

    def check(
        self,
        name: str,
        shape: tuple[int, int],
        room: int | None,
        lengths: Sequence[int],
        far: Sequence[int],
    ) -> int:
        """Refuse counts that do not fit each other or the rows' lengths; see ``ValueStore``."""
        size = self.config.block_size
        fits = tuple(self.near.keys.shape[:2]) == shape
        for length, needed, done, first in zip(
            lengths, far, self.counts, self.near.firsts, strict=False
        ):
            fits &= 0 <= needed <= done and done * size <= self.capacity
            fits &= first % size == 0 and 0 <= first <= needed * size
            fits &= length - first <= self.near.room
        if not fits:
            raise ValueError(
                f"[{name}] saved values are full from positions {self.near.firsts} on and coded in "
                f"{self.counts} blocks of rows of {list(lengths)} tokens."
            )
        return max(0, *lengths)


@dataclass(frozen=True)
class TurnedView:
    """The values that the queries of one update see.

    Attributes:
        codes: Words and scales of far tokens.
        near: [B, Hkv, n, Dv]; full values from ``firsts`` on.
        sinks: [B, Hkv, n_sinks, Dv], full values of the first tokens.
        firsts: Position of each row's first one.
        borders: Position from which on each row's last query sees full values.
        widths: Of each kv head's codes.
        head_dim: Dv.
    """

    codes: Codes
    near: mx.array
    sinks: mx.array
    firsts: tuple[int, ...]
    borders: tuple[int, ...]
    widths: tuple[int, ...]
    head_dim: int

    differs = True

    def held(self, length: int, dtype: mx.Dtype) -> mx.array:
        """[B, Hkv, length, Dv], what stands for values far from the last query."""
        return self._joined(self.borders, length, dtype)

    def full(self, length: int, dtype: mx.Dtype) -> mx.array:
        """[B, Hkv, length, Dv], full values wherever they are at hand."""
        return self._joined(self.firsts, length, dtype)

    def _joined(self, borders: Sequence[int], length: int, dtype: mx.Dtype) -> mx.array:
        last = max(borders)
        far = self.far(0, last, dtype) if last else None
        near = self.near.astype(dtype)
        return join_near(far, near, borders, self.firsts, length)

    def near_part(self, first: int, length: int, dtype: mx.Dtype) -> mx.array:
        """Full values [B, Hkv, length - first, Dv] of rows that are at one position."""
        start = self.firsts[0]
        return self.near[:, :, first - start : length - start].astype(dtype)

    def far(
        self, left: int, right: int, dtype: mx.Dtype, after: mx.array | None = None
    ) -> mx.array:
        """Coded values [B, Hkv, right - left, Dv], once ``after`` is computed."""
        words, scales = (x[:, :, left:right] for x in self.codes)
        if after is not None:
            words, scales = mx.depends([words, scales], [after])
        values = decode_values((words, scales), self.widths, self.head_dim, dtype)
        exact = self.sinks[:, :, left:right].astype(dtype)
        if not exact.shape[2]:
            return values
        return mx.concatenate([exact, values[:, :, exact.shape[2] :]], axis=2)

    def rounded(self, values: mx.array) -> mx.array:
        """New values [B, Hkv, L, Dv] as near queries read them."""
        return to_storage(values).astype(values.dtype)

    def kept(self) -> TurnedView:
        """The same: what is written later goes to buffers of its own."""
        return self


def head_widths(config: DeltaConfig, n_heads: int) -> tuple[int, ...]:
    """The width of each kv head's codes, of a setting of one layer."""
    assert config.value_bits is not None
    if config.value_widths is None or config.value_widths[0] is None:
        return tuple(share_value_bits([np.ones(n_heads)], config.value_bits)[0].tolist())
    widths = config.value_widths[0]
    if len(config.value_widths) != 1:
        raise ValueError("[DeltaConfig] value_widths of all layers: call for_layer first.")
    if len(widths) != n_heads:
        raise ValueError(
            f"[DeltaConfig] value_widths are of {len(widths)} kv heads but the layer has {n_heads}."
        )
    return widths
