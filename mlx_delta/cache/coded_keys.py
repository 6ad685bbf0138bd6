"""Keys as codes of several widths far away, full near.

The layout of a block is specified in :mod:`mlx_delta.method.codes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.codes import Coding

from .code_log import CodeLog
from .far_keys import FarKeys, check_arrays, check_buffers, read_counts
from .near_keys import NearKeys


class CodedKeys(FarKeys):
    """The keys of a layer: coded blocks far away, full keys near. A ``KeyStore``."""

    n_arrays = 4
    log: CodeLog

    @staticmethod
    def make_log(config: DeltaConfig, shape: tuple[int, int, int], dtype: mx.Dtype) -> CodeLog:
        """An empty log for [B, Hkv, D] keys."""
        return CodeLog.make(shape, config, dtype)

    # State.

    def arrays(self) -> list[Any]:
        """The buffers."""
        return [self.near.keys, *self.log.buffers(), self.sinks]

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        return {**super().header(), "coded": self.log.counts}

    @classmethod
    def restore(cls, config: DeltaConfig, header: dict[str, Any], arrays: list[Any]) -> CodedKeys:
        """The store of a state, each buffer of which is as it should be."""
        near, words, grid, sinks = arrays
        buffers = {"words": (words, 4), "grid": (grid, 5)}
        check_buffers(config, near, sinks, header["type"], buffers)
        B, H, _, D = near.shape
        size, blocks = config.block_size, words.shape[1]
        coding = Coding.of(config, H, D)
        check_arrays(
            {
                "words": (words, (B, blocks, coding.all_rows, size), mx.uint32),
                "grid": (grid, (B, H, blocks, 2, D), near.dtype),
            }
        )
        firsts, lost, coded = read_counts(header, ("firsts", "lost", "coded"), B)
        log = CodeLog(coding, words, grid, coded)
        return cls(config, NearKeys(near, firsts), log, sinks, lost, header["type"])

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> None:
        """Refuse a state whose parts do not fit together, before a kernel reads past a buffer."""
        if any(done > self.log.room for done in self.log.counts):
            raise ValueError(
                f"[{name}] saved state counts {self.log.counts} coded blocks of {self.log.room}."
            )
        super().check(name, lengths, encoded)
