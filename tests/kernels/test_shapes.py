"""A kernel never sees arrays of the wrong shape: each is refused by name before any launch."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention import choice
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.ops.backend import METAL
from mlx_delta.ops.ternary_matvec import ternary_matvec

from ..gpus import seems_to_have
from .common import walk

SETTING = DeltaConfig(key_bits=4, value_bits=4)
LENGTH, HEADS, KV_HEADS, D = 200, 4, 2, 32


def nothing_launched(**_: object) -> None:
    raise AssertionError("launched")


@pytest.fixture(autouse=True)
def no_launch():
    """Any launch is a mistake, on whatever machine; and what is stored stays so."""
    with (
        mock.patch.object(mx.fast, "metal_kernel", lambda **_: nothing_launched),
        mock.patch("mlx_delta.cache.written_out.has_kernels", lambda: True),
    ):
        yield


def fed() -> tuple[DeltaKVCache, mx.array]:
    cache = DeltaKVCache(SETTING)
    keys = walk((1, KV_HEADS, LENGTH, D), mx.float32)
    cache.update(keys[:, :, :-1], keys[:, :, :-1])
    return cache, keys[:, :, -1:]


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
