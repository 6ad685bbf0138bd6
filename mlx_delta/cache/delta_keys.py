"""Held keys stored by lanes far away, full near.

The layout of a block is specified in :mod:`mlx_delta.method.deltas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.deltas import read_structure

from .delta_log import PARTS, DeltaLog
from .far_keys import FarKeys, check_arrays, check_buffers, read_counts
from .near_keys import NearKeys


class DeltaKeys(FarKeys):
    """The keys of a layer: held keys by lanes far away, full keys near. A ``KeyStore``."""

    n_arrays = 8
    log: DeltaLog

    @staticmethod
    def make_log(config: DeltaConfig, shape: tuple[int, int, int], dtype: mx.Dtype) -> DeltaLog:
        """An empty log for [B, Hkv, D] keys."""
        return DeltaLog.make(config, shape, dtype)

    # State.

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow and where each block's words begin included."""
        return super().nbytes + self.log.offsets.nbytes

    def arrays(self) -> list[Any]:
        """The buffers, those of the log moved together."""
        self.log.settle()
        return [self.near.keys, *self.log.buffers(), self.sinks]

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {**super().header(), "stored": self.log.blocks}

    @classmethod
    def restore(cls, config: DeltaConfig, header: dict[str, Any], arrays: list[Any]) -> DeltaKeys:
        """The store of a state, each buffer of which is as it should be."""
        near, payload, *parts, sinks = arrays
        found = dict(zip(PARTS, parts, strict=True))
        dimensions = {"payload": 2, "counts": 3, "low": 4, "steps": 4, "zeros": 3, "sequence": 4}
        buffers = {**found, "payload": payload}
        check_buffers(
            config,
            near,
            sinks,
            header["type"],
            {name: (x, dimensions[name]) for name, x in buffers.items()},
        )
        B, H, _, D = near.shape
        blocks = found["low"].shape[2]
        check_arrays(
            {
                "payload": (payload, (B, *payload.shape[1:]), mx.uint32),
                "counts": (found["counts"], (B, H, blocks), mx.int32),
                "low": (found["low"], (B, H, blocks, D), near.dtype),
                "steps": (found["steps"], (B, H, blocks, D), mx.uint8),
                "zeros": (found["zeros"], (B, H, blocks), mx.int32),
                "sequence": (found["sequence"], (B, H, blocks, config.block_size), mx.uint8),
            }
        )
        firsts, lost, stored = read_counts(header, ("firsts", "lost", "stored"), B)
        if any(not 0 <= own <= blocks for own in stored):
            raise ValueError("saved row counts do not fit the setting or each other")
        log = DeltaLog.restore(config, payload, found, stored)
        return cls(config, NearKeys(near, firsts), log, sinks, lost, header["type"])

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> None:
        """Refuse a state whose parts do not fit together, before a kernel reads past a buffer."""
        super().check(name, lengths, encoded)
        self._check_words(name)

    def _check_words(self, name: str) -> None:
        """Blocks have each token once, and as many words as their masks say, all in bounds."""
        log = self.log
        sequences = np.sort(np.array(log.parts["sequence"]), axis=3)
        counts, room = np.array(log.parts["counts"]), log.payload.shape[1]
        blocks = log.read(self.sinks, self.near.keys.dtype)
        said = np.array(read_structure(blocks)[2]) if blocks is not None else 0 * counts
        for row, done in enumerate(log.blocks):
            own = counts[row, :, :done]
            fits = bool((own > 0).all() and (own <= log.stride).all())
            # Of blocks that would lie past the end, what is read of them says nothing.
            fits &= bool((sequences[row, :, :done] == np.arange(sequences.shape[3])).all())
            fits &= int(own.sum(dtype=np.int64)) + log.spare * bool(done) <= room
            if not fits or not np.array_equal(own, said[row, :, :done]):
                raise ValueError(
                    f"[{name}] saved counts or sequences of row {row} do not fit its masks and its "
                    f"payload of {room} words."
                )
