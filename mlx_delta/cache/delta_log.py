"""The blocks of a layer whose held keys are stored by lanes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.blocks import encode_deltas
from mlx_delta.ops.deltas import DeltaBlocks, LaneCoding

from .buffers import Rows
from .payload_log import LEAST_BLOCKS, PayloadLog

PARTS = ("counts", "low", "steps", "zeros", "sequence")


class DeltaLog(PayloadLog):
    """Blocks of each row. Of a block's kind it knows the coding and the tokens of a block.

    Its parts are the words of each block, its grid's ``low`` and ``steps``, the zero deltas, and
    the sequence of its tokens.
    """

    spare = 2

    @classmethod
    def make(cls, config: DeltaConfig, shape: tuple[int, int, int], dtype: mx.Dtype) -> DeltaLog:
        """An empty log for [B, Hkv, D] keys of a setting of one layer."""
        B, H, D = shape
        room = (B, H, LEAST_BLOCKS)
        parts = {name: mx.zeros(room, mx.int32) for name in ("counts", "zeros")}
        parts |= {"low": mx.zeros((*room, D), dtype), "steps": mx.zeros((*room, D), mx.uint8)}
        parts["sequence"] = mx.zeros((*room, config.block_size), mx.uint8)
        return cls.empty((LaneCoding.of(config, H, D), config.block_size), B, H, parts)

    @classmethod
    def restore(
        cls, config: DeltaConfig, payload: mx.array, parts: dict[str, mx.array], blocks: list[int]
    ) -> DeltaLog:
        """The log of buffers that are as they should be, with so many blocks in each row."""
        counts = np.array(parts["counts"]).astype(np.int64)
        B, H, _ = counts.shape
        offsets, ends = np.zeros(counts.shape, np.int32), []
        for row, done in enumerate(blocks):
            stops = np.cumsum(counts[row, :, :done].T.reshape(-1))
            begins = np.concatenate([[0], stops])[:-1]
            # Of a state that is refused later on they may be anything.
            offsets[row, :, :done] = np.clip(begins, 0, 1 << 30).reshape(done, H).T
            ends.append(stops[H - 1 :: H].tolist())
        coding = LaneCoding.of(config, H, parts["low"].shape[3])
        return cls((coding, config.block_size), parts, payload, offsets, ends)

    @property
    def coding(self) -> LaneCoding:
        """What the words are."""
        coding: LaneCoding = self.kind[0]
        return coding

    @property
    def head_dim(self) -> int:
        """D."""
        return self.parts["low"].shape[3]

    @property
    def stride(self) -> int:
        """Words of one block of one head in the worst case."""
        return self.coding.worst_words(self.kind[1])

    def read(self, sinks: mx.array | None, dtype: mx.Dtype) -> DeltaBlocks | None:
        """The blocks as the kernel reads them; ``None`` while there are none."""
        if not self.payload.shape[1]:
            return None
        low, steps, sequence = (self.parts[name] for name in ("low", "steps", "sequence"))
        rest = sequence, sinks, self.coding, self.kind[1]
        return DeltaBlocks(self.payload, self.offsets, low, steps, *rest)

    def encode(self, rows: Rows, keys: mx.array, config: DeltaConfig, done: int) -> None:
        """Hold and store blocks of keys, behind the ``done`` ones that each of these rows has."""
        new = encode_deltas(keys, config, self.coding, done)
        parts = {name: getattr(new, name) for name in PARTS}
        self.append_words(rows, new.words, new.counts, parts, done)

    def read_bytes(self, blocks: int, float_bytes: int | None = None) -> int:
        """Bytes of words, offsets, grids and sequences of the first row's first blocks."""
        low = self.parts["low"]
        item = low.itemsize if float_bytes is None else float_bytes
        each = 4 + self.head_dim * (item + 1) + self.kind[1]
        return blocks * low.shape[1] * each + self.word_bytes(blocks)

    def buffers(self) -> list[Any]:
        """The payload, and the parts."""
        return [self.payload, *(self.parts[name] for name in PARTS)]
