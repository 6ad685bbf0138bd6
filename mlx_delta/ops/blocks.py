"""Whole blocks held, and stored ones read: by kernels that are right here, else by operations.

Whether *decode attention* goes through its kernel also depends on the queries and the mask:
:mod:`mlx_delta.attention.choice` decides that.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_delta.config import DeltaConfig

from . import codes_encode, deltas_encode, hold_kernel, values_encode
from .backend import has_kernels
from .codes import CodedBlocks, Coding, code_blocks, decode_blocks
from .deltas import DeltaBlocks, LaneCoding, StoredDeltas, read_deltas, store_deltas
from .hold import hold_blocks
from .proving import proven
from .storage import storage_type
from .turned import Codes, decode_values
from .turned import encode_values as encode_by_operations

# Far keys that are not stored in full.
FarBlocks = CodedBlocks | DeltaBlocks


def hold(
    keys: mx.array, config: DeltaConfig, first_block: int, previous: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Hold the keys of whole blocks; see :func:`mlx_delta.ops.hold.hold_blocks`."""
    if has_kernels() and hold_kernel.can_hold(keys, config):
        return proven(
            ("delta_hold", keys.dtype, keys.shape[3], config.block_size, config.run_value),
            [keys],
            lambda: hold_kernel.hold(keys, config, first_block),
            lambda: hold_blocks(keys, config, first_block, previous),
            lambda held: held[:1],
        )
    return hold_blocks(keys, config, first_block, previous)


def encode_codes(
    keys: mx.array, coding: Coding, size: int, felt: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Code the keys of whole blocks; see :func:`mlx_delta.ops.codes.code_blocks`."""
    if has_kernels() and codes_encode.can_encode(size, keys.shape[3]):
        D = keys.shape[3]
        return proven(
            ("codes_encode", keys.dtype, keys.shape[1], D, size, felt is None, coding.turned),
            [keys],
            lambda: codes_encode.encode(keys, coding, size, felt),
            lambda: code_blocks(keys, coding, size, felt),
            lambda coded: [decode_blocks(CodedBlocks(*coded, None, coding, D))],
        )
    return code_blocks(keys, coding, size, felt)


def encode_deltas(
    keys: mx.array, config: DeltaConfig, coding: LaneCoding, first_block: int
) -> StoredDeltas:
    """Hold and store the keys of whole blocks; see :func:`mlx_delta.ops.deltas.store_deltas`."""
    if deltas_encode.can_encode(config, keys.shape[3]):
        form = (keys.dtype, *keys.shape[1::2], config.block_size, config.threshold_mode)
        return proven(
            ("deltas_encode", *form),
            [keys],
            lambda: deltas_encode.encode(keys, config, coding, first_block),
            lambda: store_deltas(keys, config, coding, first_block),
            lambda stored: [read_deltas(stored.apart(coding, config.block_size))],
        )
    return store_deltas(keys, config, coding, first_block)


def encode_values(values: mx.array, widths: Sequence[int]) -> Codes:
    """Turn and code values; see :func:`mlx_delta.ops.turned.encode_values`."""
    if has_kernels() and values_encode.can_encode(values.shape[3]):
        D, dtype = values.shape[3], storage_type(values.dtype)
        return proven(
            ("values_encode", values.dtype, D, tuple(widths)),
            [values],
            lambda: values_encode.encode(values, widths),
            lambda: encode_by_operations(values, widths),
            lambda codes: [decode_values(codes, widths, D, dtype)],
        )
    return encode_by_operations(values, widths)


def unpack(stored: FarBlocks, blocks: int) -> mx.array:
    """Keys of the first blocks in full, [B, Hkv, blocks * block_size, D] of the storage type."""
    if isinstance(stored, CodedBlocks):
        return decode_blocks(stored.first(blocks))
    return read_deltas(stored.first(blocks))
