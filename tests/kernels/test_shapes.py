"""A kernel never sees arrays of the wrong shape: each is refused by name before any launch."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaKVCache
from mlx_delta.attention import choice
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.ops import blocks as whole_blocks
from mlx_delta.ops import decode_kernel, pack_kernel
from mlx_delta.ops.backend import METAL
from mlx_delta.ops.hold import hold_blocks
from mlx_delta.ops.pack import PackedBlocks
from mlx_delta.ops.ternary_matvec import ternary_matvec

from ..gpus import seems_to_have
from ..metal_cpu import MetalBench
from .common import config, on_bench, walk

SETTING = config(4, block_size=8, window=8, value_bits=4)
LENGTH, HEADS, KV_HEADS, D = 200, 4, 2, 32


def nothing_launched(**_: object) -> None:
    raise AssertionError("launched")


@pytest.fixture(autouse=True)
def no_launch():
    """Any launch is a mistake, on whatever machine; and what is packed stays packed."""
    with (
        mock.patch.object(mx.fast, "metal_kernel", lambda **_: nothing_launched),
        mock.patch("mlx_delta.cache.written_out.has_kernels", lambda: True),
    ):
        builders = (decode_kernel.decode_kernel, decode_kernel.reduce_kernel)
        for builder in (*builders, pack_kernel.encode_kernel, pack_kernel.unpack_kernel):
            builder.cache_clear()
        yield
        for builder in (*builders, pack_kernel.encode_kernel, pack_kernel.unpack_kernel):
            builder.cache_clear()


def fed() -> tuple[DeltaKVCache, mx.array]:
    cache = DeltaKVCache(SETTING)
    keys = walk((1, KV_HEADS, LENGTH, D), mx.float32)
    cache.update(keys[:, :, :-1], keys[:, :, :-1])
    return cache, keys[:, :, -1:]


def decode_arguments(steps: int = 1) -> dict:
    """Arguments that the launcher takes."""
    cache, new = fed()
    step = cache.update(new, new)
    assert isinstance(step.far, PackedBlocks)
    return {
        "queries": mx.zeros((1, HEADS, steps, D)),
        "rows": list(zip(step.starts, step.encoded, step.firsts, strict=True)),
        "blocks": step.far,
        "near": step.near,
        "values": step.stored_values.buffers,
        "value_bits": 4,
        "mask": None,
        "scale": 1.0,
        "window_blocks": 1,
    }


def test_what_fits_is_launched():
    with pytest.raises(AssertionError, match="launched"):
        decode_kernel.decode(**decode_arguments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"queries": mx.zeros((1, HEADS, D))}, r"queries must have shape \[1, any"),
        (lambda a: {"queries": mx.zeros((2, HEADS, 1, D))}, "queries must have shape"),
        (lambda a: {"queries": mx.zeros((1, HEADS, 1, 2 * D))}, "queries must have shape"),
        (lambda a: {"queries": mx.zeros((1, 3, 1, D))}, "do not fit 2 kv heads"),
        (lambda a: {"queries": mx.zeros((1, HEADS, 0, D))}, "do not fit 2 kv heads"),
        (lambda a: {"queries": mx.zeros((1, 600, 1, D))}, "takes at most 256 queries"),
        (lambda a: {"rows": []}, "numbers of 0 rows for 1 rows"),
        (lambda a: {"rows": a["rows"] * 2}, "numbers of 2 rows for 1 rows"),
        (lambda a: {"rows": [(199, 99, 176)]}, "99 packed blocks"),
        (lambda a: {"rows": [(199, 23, 192)]}, "near keys from 192 on"),
        (lambda a: {"rows": [(199, 23, 0)]}, "near keys from 0 on"),
        (lambda a: {"rows": [(300, 23, 176)]}, "there are 256 values for 301 tokens"),
        (lambda a: {"near": a["near"][:, :1]}, "near must have shape"),
        (lambda a: {"near": a["near"][..., :16]}, "near must have shape"),
        (lambda a: {"near": a["near"][:, :, :8]}, "and 8 near keys"),
        (lambda a: {"near": a["near"].astype(mx.float32)}, "near must be .*float16"),
        (lambda a: {"values": a["values"][:1]}, "4-bit values are not 1 arrays"),
        (lambda a: {"value_bits": 8}, "values must have shape"),
        (lambda a: {"values": tuple(x[:, :1] for x in a["values"])}, "values must have shape"),
        (lambda a: {"values": tuple(x[:, :, :100] for x in a["values"])}, "100 values for 200"),
        (
            lambda a: {"values": (a["values"][0], a["values"][1][:, :, :9], a["values"][2])},
            "scales must have shape",
        ),
        (lambda a: {"mask": mx.ones((1, 1, 9), mx.bool_)}, "mask must be .*200.* has shape"),
        (lambda a: {"mask": mx.ones((1, 9), mx.bool_)}, "mask must have shape"),
        (lambda a: {"mask": mx.ones((1, 2, 200), mx.bool_)}, "mask must have shape"),
        (lambda a: {"mask": mx.ones((3, 1, 200), mx.bool_)}, "mask must be .1 or 1"),
        (lambda a: {"mask": mx.ones((1, 1, 200))}, "mask must be .*bool"),
    ],
)
def test_decode(change, message):
    arguments = decode_arguments()
    with pytest.raises(ValueError, match=rf"^\[delta_decode\] .*{message}"):
        decode_kernel.decode(**{**arguments, **change(arguments)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"masks": b.masks[..., 0]}, "masks must have shape"),
        (lambda b: {"masks": b.masks[..., :0]}, "masks must have shape"),
        (lambda b: {"payload": b.payload[0]}, "payload must have shape"),
        (lambda b: {"payload": b.payload.astype(mx.int32)}, "payload must be .*uint32"),
        (lambda b: {"offsets": b.offsets[:, :, :1]}, "offsets must have shape"),
        (lambda b: {"grid": None}, "takes .* grid here"),
        (lambda b: {"grid": b.grid[..., :16]}, "grid must have shape"),
        (lambda b: {"grid": b.grid.astype(mx.float32)}, "grid must be .*float16"),
        (lambda b: {"bits": 16}, "takes no grid here"),
        (lambda b: {"sinks": b.sinks[:, :1]}, "sinks must have shape"),
        (lambda b: {"head_dim": 64}, "masks must have shape|must have shape"),
    ],
)
@pytest.mark.parametrize("kernel", ["delta_unpack", "delta_decode"])
def test_packed_blocks(kernel, change, message):
    arguments = decode_arguments()
    blocks = replace(arguments["blocks"], **change(arguments["blocks"]))
    with pytest.raises(ValueError, match=rf"^\[{kernel}\] .*({message})"):
        if kernel == "delta_unpack":
            pack_kernel.unpack(blocks, 3)
        else:
            decode_kernel.decode(**{**arguments, "blocks": blocks})


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="there are 24 blocks but 25 are asked for"):
        pack_kernel.unpack(decode_arguments()["blocks"], 25)


@pytest.mark.parametrize(
    "keys",
    [
        mx.zeros((1, 16, 32), mx.float16),
        mx.zeros((1, 1, 15, 32), mx.float16),
        mx.zeros((1, 1, 16, 32)),
    ],
    ids=["three dimensions", "part of a block", "float32"],
)
def test_encode(keys):
    with pytest.raises(ValueError, match=r"^\[delta_encode\] "):
        pack_kernel.encode(keys, SETTING, 0)


@pytest.mark.parametrize(
    ("x", "weight", "scales"),
    [
        ((1, 64), (8, 5), (8, 1)),
        ((5, 64), (8, 4), (8, 1)),
        ((0, 64), (8, 4), (8, 1)),
        ((64,), (8, 4), (8, 1)),
        ((1, 64), (7, 4), (7, 1)),
        ((1, 72), (8, 4), (8, 1)),
        ((1, 64), (8, 4), (8, 0)),
        ((1, 64), (8, 4), (4, 1)),
    ],
)
def test_ternary(x, weight, scales):
    with pytest.raises(ValueError, match=r"^\[ternary_matvec\] "):
        ternary_matvec(mx.zeros(x), mx.zeros(weight, mx.uint32), mx.zeros(scales), True)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "operations"])
@pytest.mark.parametrize(
    ("queries", "mask", "message"),
    [
        ((1, HEADS, 1, D), mx.ones((1, 9), mx.bool_), r"mask must broadcast .*200.* has shape"),
        ((1, HEADS, 1, D), mx.ones((1, 1), mx.bool_), "mask must broadcast"),
        ((1, HEADS, 1, D), mx.ones((2, LENGTH), mx.bool_), "mask must broadcast"),
        ((1, HEADS, 1, D), mx.ones((3, 1, 1, LENGTH), mx.bool_), "mask must broadcast"),
        ((1, HEADS, 1, D), "full", "mask must be 'causal'"),
        ((1, HEADS, 2, D), None, "queries .* do not fit keys"),
        ((1, 3, 1, D), None, "queries .* do not fit keys"),
        ((1, HEADS, 1, 16), None, "queries .* do not fit keys"),
        ((HEADS, 1, D), None, "queries .* do not fit keys"),
    ],
)
def test_attention_refuses_them_whoever_computes(queries, mask, message, kernel):
    cache, new = fed()
    with seems_to_have(METAL if kernel else None):
        with pytest.raises(ValueError, match=rf"^\[delta_attention\] {message}"):
            delta_attention(mx.zeros(queries), new, new, cache, 1.0, mask)
    assert cache.offset == LENGTH - 1, "nothing was appended"


def test_keys_and_values_that_do_not_fit_each_other():
    cache, new = fed()
    for values in (new[:, :1], new[0], mx.zeros((1, KV_HEADS, 2, D))):
        with pytest.raises(ValueError, match="keys and values must be .B, Hkv, L, D."):
            cache.update(new, values)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (mx.zeros((1, LENGTH)), "the mask is of type .*float32, not boolean"),
        (mx.ones((1, HEADS, 1, LENGTH), mx.bool_), "the mask has shape"),
    ],
)
def test_decoding_without_the_kernel_where_there_is_one_is_said_once(mask, reason):
    cache, new = fed()
    choice._warn.cache_clear()
    step = cache.update(new, new)
    queries = mx.zeros((1, HEADS, 1, D))
    with seems_to_have(METAL):
        with pytest.warns(UserWarning, match=f"decoding without the kernel, .*{reason}") as said:
            assert choice.decode_blocks(queries, step, mask) is None
            assert choice.decode_blocks(queries, step, mask) is None
        assert len(said) == 1
        assert choice.decode_blocks(queries, step, None) is step.far
    assert choice.decode_blocks(queries, step, None) is None, "no kernels here"


@pytest.mark.parametrize("run_value", ["mean", "first"])
@pytest.mark.parametrize("sinks", [0, 4, 20])
def test_holding_in_full_by_the_kernels(bench: MetalBench, no_launch, run_value, sinks):
    """Packed at 16 bits and unpacked again, keys are what the operations hold them as."""
    setting = replace(config(16, block_size=16, window=16), key_bits=None, run_value=run_value)
    setting = replace(setting, sinks=sinks)
    with mock.patch.object(mx.fast, "metal_kernel", METAL_KERNEL):
        for first, rows in ((0, 1), (1, 2)):
            keys = walk((rows, 2, 48, 32), mx.float16)
            assert pack_kernel.can_hold(keys, setting)
            with on_bench(bench):
                held, zeros = whole_blocks.hold(keys, setting, first)
            wanted, wanted_zeros = hold_blocks(keys, setting, first)
            np.testing.assert_array_equal(held.astype(mx.float32), wanted.astype(mx.float32))
            np.testing.assert_array_equal(zeros, wanted_zeros)


METAL_KERNEL = mx.fast.metal_kernel
