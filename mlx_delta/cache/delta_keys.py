"""Held keys stored by lanes far away, full near.

The layout of a block is specified in :mod:`mlx_delta.method.deltas`. All else is as with packed
keys, and theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.deltas import read_structure
from mlx_delta.ops.pack import HEAD_DIMS, LARGEST, storage_type

from .coded_keys import CodedKeys, check_widths
from .delta_log import PARTS, DeltaLog
from .near_keys import NearKeys
from .packed_keys import DTYPES, PackedKeys
from .packed_state import check_lost, check_near
from .store import spread


class DeltaKeys(PackedKeys):
    """The keys of a layer: held keys by lanes far away, full keys near. A ``KeyStore``."""

    n_arrays = 7
    log: DeltaLog

    @staticmethod
    def make_log(config: DeltaConfig, shape: tuple[int, int, int], dtype: mx.Dtype) -> DeltaLog:
        """An empty log for [B, Hkv, D] keys."""
        return DeltaLog.make(config, shape, dtype)

    check_new = staticmethod(CodedKeys.check_new)

    # State.

    def arrays(self) -> list[Any]:
        """The buffers, those of the log moved together."""
        self.log.settle()
        return [self.near.keys, *self.log.buffers(), self.sinks]

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        counts = {"firsts": self.near.firsts, "lost": self.lost, "stored": self.log.blocks}
        return {**counts, "type": self._type}

    @classmethod
    def restore(cls, config: DeltaConfig, header: dict[str, Any], arrays: list[Any]) -> DeltaKeys:
        """The store of a state, each buffer of which is as it should be."""
        near, payload, *parts, sinks = arrays
        if header["type"] not in DTYPES:
            raise ValueError(f"it is of type {header['type']!r}")
        if any(not isinstance(x, mx.array) for x in (near, payload, *parts)):
            raise ValueError("it lacks one of its buffers")
        found = dict(zip(PARTS, parts, strict=True))
        if near.ndim != 4 or found["low"].ndim != 4:
            raise ValueError("saved near keys or grids do not have the right dimensions")
        B, H, _, D = near.shape
        check_widths(config, H, D)
        blocks = found["low"].shape[2]
        shapes = {
            "near": (near, (B, H, (config.window_blocks + 2) * config.block_size, D), near.dtype),
            "payload": (payload, (B, *payload.shape[1:2]), mx.uint32),
            "counts": (found["counts"], (B, H, blocks), mx.int32),
            "low": (found["low"], (B, H, blocks, D), near.dtype),
            "steps": (found["steps"], (B, H, blocks, D), mx.uint8),
            "zeros": (found["zeros"], (B, H, blocks), mx.int32),
        }
        wrong = [
            what
            for what, (array, shape, dtype) in shapes.items()
            if tuple(array.shape) != shape or array.dtype != dtype
        ]
        if D not in HEAD_DIMS or near.dtype not in LARGEST:
            wrong.insert(0, "near")
        elif near.dtype != storage_type(DTYPES[header["type"]]):
            wrong.insert(0, "near")
        wanted = ((B, H, config.sinks, D), near.dtype) if config.sinks else None
        if (None if sinks is None else (tuple(sinks.shape), sinks.dtype)) != wanted:
            wrong.append("sinks")
        names = ("firsts", "lost", "stored")
        counts = {name: spread(header[name], B) for name in names if name in header}
        if any(len(own) != B for own in counts.values()) or len(counts) != len(names):
            wrong.append("row counts")
        elif any(not 0 <= own <= blocks for own in counts["stored"]):
            wrong.append("row counts")
        if wrong:
            raise ValueError(f"saved {wrong[0]} do not fit the setting or each other")
        log = DeltaLog.restore(config, payload, found, counts["stored"])
        near_keys = NearKeys(near, counts["firsts"])
        return cls(config, near_keys, log, sinks, counts["lost"], header["type"])

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> None:
        """Refuse a state whose parts do not fit together, before a kernel reads past a buffer."""
        done = self.log.blocks
        if any(not 0 <= needed <= own for needed, own in zip(encoded, done, strict=True)):
            raise ValueError(
                f"[{name}] saved state counts {list(encoded)} encoded blocks and {done} "
                "stored ones."
            )
        self._check_words(name)
        firsts = self.near.firsts
        check_near(name, self.config, lengths, encoded, firsts)
        check_lost(name, self.config, lengths, done, firsts, self.lost)

    def _check_words(self, name: str) -> None:
        """Every block has as many words as its masks say, one block after another, in bounds."""
        log = self.log
        counts, room = np.array(log.parts["counts"]), log.payload.shape[1]
        blocks = log.read(self.sinks, self.near.keys.dtype)
        said = np.array(read_structure(blocks)[2]) if blocks is not None else 0 * counts
        for row, done in enumerate(log.blocks):
            own = counts[row, :, :done]
            fits = bool((own > 0).all() and (own <= log.stride).all())
            # Of blocks that would lie past the end, what is read of them says nothing.
            fits &= int(own.sum(dtype=np.int64)) + log.spare * bool(done) <= room
            if not fits or not np.array_equal(own, said[row, :, :done]):
                raise ValueError(
                    f"[{name}] saved counts of row {row} do not fit its masks and its payload of "
                    f"{room} words."
                )
