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
from .far_values import TOKENS
from .hold import hold_blocks
from .proving import TRIED_BLOCKS, blocks_to_try, kind_of, proven, tokens_like
from .storage import storage_type
from .turned import Codes, decode_values
from .turned import encode_values as encode_by_operations

# Far keys that are not stored in full.
FarBlocks = CodedBlocks | DeltaBlocks


def hold(
    keys: mx.array, config: DeltaConfig, first_block: int, previous: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Hold the keys of whole blocks; see :func:`mlx_delta.ops.hold.hold_blocks`."""

    def operations(keys: mx.array) -> tuple[mx.array, mx.array]:
        return hold_blocks(keys, config, first_block, previous)

    if not has_kernels() or not hold_kernel.can_hold(keys, config):
        return operations(keys)
    return proven(
        ("delta_hold", *kind_of(keys, config.block_size)),
        keys,
        lambda keys: hold_kernel.hold(keys, config, first_block),
        operations,
        lambda held: held,
        lambda: tokens_like(keys, blocks_to_try(config), config.block_size),
    )


def encode_codes(
    keys: mx.array, coding: Coding, size: int, felt: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Code the keys of whole blocks; see :func:`mlx_delta.ops.codes.code_blocks`."""

    def operations(keys: mx.array) -> tuple[mx.array, mx.array]:
        return code_blocks(keys, coding, size, felt)

    D = keys.shape[3]
    if not has_kernels() or not codes_encode.can_encode(size, D):
        return operations(keys)
    return proven(
        ("codes_encode", *kind_of(keys, size)),
        keys,
        lambda keys: codes_encode.encode(keys, coding, size, felt),
        operations,
        lambda coded: [decode_blocks(CodedBlocks(coded[0], coded[1], None, coding, D))],
        lambda: tokens_like(keys, TRIED_BLOCKS, size),
    )


def encode_deltas(
    keys: mx.array, config: DeltaConfig, coding: LaneCoding, first_block: int
) -> StoredDeltas:
    """Hold and store the keys of whole blocks; see :func:`mlx_delta.ops.deltas.store_deltas`."""

    def operations(keys: mx.array) -> StoredDeltas:
        return store_deltas(keys, config, coding, first_block)

    size = config.block_size
    if not deltas_encode.can_encode(config, keys.shape[3]):
        return operations(keys)
    return proven(
        ("deltas_encode", *kind_of(keys, size)),
        keys,
        lambda keys: deltas_encode.encode(keys, config, coding, first_block),
        operations,
        lambda stored: [read_deltas(stored.apart(coding, size)), stored.counts, stored.zeros],
        lambda: tokens_like(keys, blocks_to_try(config), size),
    )


def encode_values(values: mx.array, widths: Sequence[int]) -> Codes:
    """Turn and code values; see :func:`mlx_delta.ops.turned.encode_values`."""

    def operations(values: mx.array) -> Codes:
        return encode_by_operations(values, widths)

    D, dtype = values.shape[3], storage_type(values.dtype)
    if not has_kernels() or not values_encode.can_encode(D):
        return operations(values)
    return proven(
        ("values_encode", *kind_of(values, TOKENS)),
        values,
        lambda values: values_encode.encode(values, widths),
        operations,
        lambda codes: [decode_values(codes, widths, D, dtype)],
        lambda: tokens_like(values, TRIED_BLOCKS, TOKENS),
    )


def unpack(stored: FarBlocks, blocks: int) -> mx.array:
    """Keys of the first blocks in full, [B, Hkv, blocks * block_size, D] of the storage type."""
    if isinstance(stored, CodedBlocks):
        return decode_blocks(stored.first(blocks))
    return read_deltas(stored.first(blocks))
