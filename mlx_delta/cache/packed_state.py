"""Checks of a saved packed cache: whatever is wrong is said before a kernel reads past a buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.pack import HEAD_DIMS, LARGEST, PackedBlocks

BUFFERS = ("near", "masks", "payload", "offsets", "grid", "sinks", "zeros")


def check_shapes(config: DeltaConfig, buffers: Mapping[str, Any], rows: Mapping[str, int]) -> None:
    """Refuse buffers that do not fit the setting or each other.

    Args:
        config: The setting that came with them.
        buffers: By the names in ``BUFFERS``.
        rows: How many rows the state counts ``ends`` and ``firsts`` for.
    """
    needed = ("near", "masks", "payload", "offsets", "zeros")
    if any(not isinstance(buffers[what], mx.array) for what in needed):
        raise ValueError("it lacks one of its buffers")
    near, masks = buffers["near"], buffers["masks"]
    if near.ndim != 4 or masks.ndim != 5:
        raise ValueError("saved near keys or masks do not have the right dimensions")
    B, H, room, D = near.shape
    blocks, size = masks.shape[2], config.block_size
    codes = config.key_bits != 16
    expected: dict[str, tuple[int, ...] | None] = {
        "near": (B, H, (config.window_blocks + 2) * size, D),
        "masks": (B, H, blocks, size - 1, -(-D // 32)),
        "offsets": (B, H, blocks),
        "zeros": (B, H, blocks),
        "grid": (B, H, blocks, 2, D) if codes else None,
        "sinks": (B, H, config.sinks, D) if codes and config.sinks else None,
    }
    types: dict[str, Any] = {"masks": mx.uint32, "offsets": mx.int32, "zeros": mx.int32}
    types |= {"grid": near.dtype, "sinks": near.dtype}
    wrong = [
        what
        for what, shape in expected.items()
        if (None if buffers[what] is None else tuple(buffers[what].shape)) != shape
        or (shape is not None and buffers[what].dtype != types.get(what, near.dtype))
    ]
    if D not in HEAD_DIMS or near.dtype not in LARGEST:
        wrong.insert(0, "near")
    payload = buffers["payload"]
    if payload.dtype != mx.uint32 or payload.ndim != 2 or len(payload) != B:
        wrong.append("payload")
    if rows["ends"] != B or rows["firsts"] != B:
        wrong.append("row counts")
    if wrong:
        raise ValueError(f"saved {wrong[0]} do not fit the setting or each other")


def check_runs(
    name: str, blocks: PackedBlocks, ends: Sequence[Sequence[int]], encoded: Sequence[int]
) -> None:
    """Every block's words lie one after another, as many as its mask has bits, in bounds."""
    B, H, capacity = blocks.offsets.shape
    offsets, masks = np.array(blocks.offsets), np.array(blocks.masks)
    values = np.bitwise_count(masks).sum(axis=(3, 4), dtype=np.int64) + blocks.head_dim
    words = -(-values // (32 // blocks.bits))
    for row in range(B):
        needed, done = encoded[row], len(ends[row])
        if not 0 <= needed <= done or done > capacity:
            raise ValueError(
                f"[{name}] saved state counts {needed} encoded blocks and {done} packed ones of "
                f"{capacity}."
            )
        stops = np.cumsum(words[row, :, :done].T.reshape(-1))
        begins = np.concatenate([[0], stops])[:-1].reshape(done, H).T
        fits = not done or stops[-1] <= blocks.payload.shape[1]
        fits &= np.array_equal(offsets[row, :, :done], begins)
        fits &= list(ends[row]) == stops[H - 1 :: H].tolist()
        # Blocks that are not there have empty masks: unpacked, they stay in bounds.
        fits &= not offsets[row, :, done:].any() and not masks[row, :, done:].any()
        if not fits:
            raise ValueError(
                f"[{name}] saved offsets of row {row} do not fit its masks and its payload of "
                f"{blocks.payload.shape[1]} words."
            )


def check_near(
    name: str,
    config: DeltaConfig,
    lengths: Sequence[int],
    encoded: Sequence[int],
    firsts: Sequence[int],
) -> None:
    """Near keys begin at a block's border, and reach from the packed blocks to the last token."""
    size = config.block_size
    room = (config.window_blocks + 2) * size
    for length, first, done in zip(lengths, firsts, encoded, strict=True):
        if first % size or not 0 <= first <= done * size or length - first > room:
            raise ValueError(
                f"[{name}] saved state has near keys from position {first} on for {length} "
                f"tokens and {done} encoded blocks."
            )


def check_lost(
    name: str,
    config: DeltaConfig,
    lengths: Sequence[int],
    packed: Sequence[int],
    firsts: Sequence[int],
    lost: Sequence[int],
) -> None:
    """Blocks without full keys are complete, packed, and all those before the near keys."""
    fits = len(lost) == len(firsts)
    for length, blocks, first, gone in zip(lengths, packed, firsts, lost, strict=False):
        fits &= first // config.block_size <= gone <= blocks
        fits &= gone * config.block_size <= max(0, length)
    if not fits:
        raise ValueError(
            f"[{name}] saved state counts {list(lost)} blocks without full keys for near keys from "
            f"positions {list(firsts)} on and {list(packed)} packed blocks."
        )
