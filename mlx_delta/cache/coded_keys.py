"""Keys as codes of several widths far away, full near.

The layout of a block is specified in :mod:`mlx_delta.method.codes`. All else is as with packed
keys, and theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.codes import Coding
from mlx_delta.ops.pack import HEAD_DIMS, LARGEST, storage_type

from .code_log import CodeLog
from .near_keys import NearKeys
from .packed_keys import DTYPES, PackedKeys
from .packed_state import check_lost, check_near
from .store import spread


class CodedKeys(PackedKeys):
    """The keys of a layer: coded blocks far away, full keys near. A ``KeyStore``."""

    n_arrays = 4
    log: CodeLog

    @staticmethod
    def make_log(config: DeltaConfig, shape: tuple[int, int, int], dtype: mx.Dtype) -> CodeLog:
        """An empty log for [B, Hkv, D] keys."""
        return CodeLog.make(shape, config, dtype)

    @staticmethod
    def check_new(config: DeltaConfig, keys: mx.array) -> None:
        """Refuse keys that can't be coded.

        Raises:
            ValueError: Their type or head_dim has no kernel, or the widths are of other keys.
        """
        PackedKeys.check_new(config, keys)
        check_widths(config, keys.shape[1], keys.shape[3])

    # State.

    def arrays(self) -> list[Any]:
        """The buffers."""
        return [self.near.keys, *self.log.buffers(), self.sinks]

    def header(self) -> dict[str, Any]:
        """What belongs to the state besides the buffers, as JSON values."""
        counts = {"firsts": self.near.firsts, "lost": self.lost, "coded": self.log.counts}
        return {**counts, "type": self._type}

    @classmethod
    def restore(cls, config: DeltaConfig, header: dict[str, Any], arrays: list[Any]) -> CodedKeys:
        """The store of a state, each buffer of which is as it should be."""
        near, words, grid, sinks = arrays
        if header["type"] not in DTYPES:
            raise ValueError(f"it is of type {header['type']!r}")
        if any(not isinstance(x, mx.array) for x in (near, words, grid)):
            raise ValueError("it lacks one of its buffers")
        if near.ndim != 4 or words.ndim != 4:
            raise ValueError("saved near keys or words do not have the right dimensions")
        B, H, _, D = near.shape
        check_widths(config, H, D)
        size, blocks = config.block_size, words.shape[1]
        coding = Coding.of(config, H, D)
        wrong = {
            "near": near.shape != (B, H, (config.window_blocks + 2) * size, D)
            or near.dtype not in LARGEST
            or near.dtype != storage_type(DTYPES[header["type"]])
            or D not in HEAD_DIMS,
            "words": words.shape != (B, blocks, coding.all_rows, size) or words.dtype != mx.uint32,
            "grid": grid.shape != (B, H, blocks, 2, D) or grid.dtype != near.dtype,
            "sinks": (None if sinks is None else (tuple(sinks.shape), sinks.dtype))
            != (((B, H, config.sinks, D), near.dtype) if config.sinks else None),
        }
        counts = {
            name: spread(header[name], B) for name in ("firsts", "lost", "coded") if name in header
        }
        wrong["row counts"] = any(len(found) != B for found in counts.values()) or len(counts) != 3
        if any(wrong.values()):
            what = next(name for name, bad in wrong.items() if bad)
            raise ValueError(f"saved {what} do not fit the setting or each other")
        log = CodeLog(coding, words, grid, counts["coded"])
        near_keys = NearKeys(near, counts["firsts"])
        return cls(config, near_keys, log, sinks, counts["lost"], header["type"])

    def check(self, name: str, lengths: Sequence[int], encoded: Sequence[int]) -> None:
        """Refuse a state whose parts do not fit together, before a kernel reads past a buffer."""
        room = self.log.room
        for needed, done in zip(encoded, self.log.counts, strict=True):
            if not 0 <= needed <= done <= room:
                raise ValueError(
                    f"[{name}] saved state counts {needed} encoded blocks and {done} coded ones of "
                    f"{room}."
                )
        firsts = self.near.firsts
        check_near(name, self.config, lengths, encoded, firsts)
        check_lost(name, self.config, lengths, self.log.counts, firsts, self.lost)


def check_widths(config: DeltaConfig, n_heads: int, head_dim: int) -> None:
    """Refuse widths that are of keys of another shape."""
    widths = None if config.key_widths is None else config.key_widths[0]
    if widths is None:
        return
    if len(config.key_widths or ()) != 1:
        raise ValueError("[DeltaConfig] key_widths of all layers: call for_layer first.")
    if (len(widths), len(widths[0])) != (n_heads, head_dim):
        raise ValueError(
            f"[DeltaConfig] key_widths are of {len(widths)} kv heads of {len(widths[0])} channels "
            f"but the layer has {n_heads} of {head_dim}."
        )
