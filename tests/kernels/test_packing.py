"""Packing and unpacking: the operations, and the kernels, against the specification."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.config import KEY_BITS
from mlx_delta.method import storage as ref
from mlx_delta.ops import pack as packing
from mlx_delta.ops import pack_kernel
from mlx_delta.ops.pack import EncodedBlocks, PackedBlocks

from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import (
    STORED,
    UNWRITTEN,
    as_float,
    config,
    every_run,
    fast_runs,
    on_bench,
    packed_blocks,
    source_of,
    special_keys,
    walk,
    with_kernel,
)

HALVES = {"fp16": mx.float16, "bf16": mx.bfloat16}
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES.keys())
each_run_value = pytest.mark.parametrize("run_value", ["mean", "first"])
each_width = pytest.mark.parametrize("bits", KEY_BITS)
KINDS = ["constant", "alternating", "extreme", "nan", "inf"]


def assert_encoded(got: EncodedBlocks, keys: mx.array, setting: DeltaConfig, first: int = 0):
    """Everything is what the reference packs, bit for bit."""
    bits = setting.key_bits
    assert bits is not None
    D, size = keys.shape[3], setting.block_size
    counts, masks, payload = (np.array(x) for x in (got.counts, got.masks, got.payload))
    for index, block in packed_blocks(keys, setting, first):
        np.testing.assert_array_equal(masks[index], block.mask)
        assert counts[index][0] == block.count
        row = (first + index[2]) * size
        counted = np.arange(row + 1, row + size) >= setting.sinks
        zeros = D * counted.sum() - np.bitwise_count(block.mask)[counted].sum()
        assert counts[index][1] == zeros
        words = payload[index][: len(block.payload)]
        used = np.uint32(0xFFFFFFFF)
        if bits == 16 and block.count % 2:  # the last half is not written
            used = np.uint32(0xFFFF)
        if bits == 16 and not np.isfinite(as_float(keys[index[:2]])).all():
            words, wanted = _floats(words, keys.dtype), _floats(block.payload, keys.dtype)
            end = block.count  # a NaN may be stored as any NaN
            np.testing.assert_array_equal(words[:end], wanted[:end])
        else:
            np.testing.assert_array_equal(words[:-1], block.payload[:-1])
            assert words[-1] & used == block.payload[-1] & used
        if block.grid is not None:
            assert got.grid is not None
            np.testing.assert_array_equal(as_float(got.grid[index]), block.grid)


def _floats(words: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return as_float(mx.array(words).view(dtype))


def end_to_end(encoded: EncodedBlocks, setting: DeltaConfig, keys: mx.array) -> PackedBlocks:
    """Payloads behind each other with room between them, as the cache has them in decode."""
    B, H, blocks, stride = encoded.payload.shape
    offsets = mx.arange(H * blocks, dtype=mx.int32).reshape(1, H, blocks) * stride
    assert setting.key_bits is not None
    return PackedBlocks(
        masks=encoded.masks,
        payload=encoded.payload.reshape(B, -1),
        offsets=mx.repeat(offsets, B, axis=0),
        grid=encoded.grid,
        sinks=None,
        bits=setting.key_bits,
        dtype=keys.dtype,
        head_dim=keys.shape[3],
    )


def assert_unpacked(got: mx.array, keys: mx.array, setting: DeltaConfig):
    """Held keys are what the reference unpacks."""
    assert setting.key_bits is not None
    size, D = setting.block_size, keys.shape[3]
    for index, block in packed_blocks(keys, setting):
        held = ref.unpack_block(block, D, setting.key_bits, STORED[keys.dtype])
        row, head, number = index
        part = as_float(got[row, head, number * size : (number + 1) * size])
        np.testing.assert_array_equal(part, held)


# The operations, and the specification itself.


@each_run_value
@each_width
@each_half
@pytest.mark.parametrize("head_dim", [16, 80])
def test_operations(bits, dtype, head_dim, run_value):
    setting = config(bits, block_size=16, window=0, sinks=5, run_value=run_value)
    keys = walk((2, 2, 48, head_dim), dtype)
    encoded = packing.pack_blocks(keys, setting, 0)
    assert_encoded(encoded, keys, setting)
    unpacked = packing.unpack_blocks(end_to_end(encoded, setting, keys))
    assert_unpacked(unpacked, keys, setting)


@each_run_value
@each_width
@each_half
@pytest.mark.parametrize("kind", KINDS)
def test_operations_on_special_keys(bits, dtype, kind, run_value):
    setting = config(bits, block_size=16, window=0, run_value=run_value)
    keys = special_keys(kind, (1, 2, 32, 32), dtype)
    encoded = packing.pack_blocks(keys, setting, 0)
    assert_encoded(encoded, keys, setting)
    unpacked = packing.unpack_blocks(end_to_end(encoded, setting, keys))
    assert_unpacked(unpacked, keys, setting)


@each_width
def test_errors_are_bounded(bits):
    """A first value is within the threshold of the key, or within half a step of its code."""
    keys = np.array(walk((64, 64), mx.float16)).astype(np.float32)
    block = ref.pack_block(keys, bits, "float16", 0.4, 0, 0, "first")
    error = np.abs(ref.unpack_block(block, 64, bits, "float16") - keys)
    half_step = 0 if block.grid is None else block.grid[1] / 2
    assert (error <= np.maximum(0.4, half_step * 1.01 + 1e-3)).all()


@each_width
def test_errors_of_means_are_bounded(bits):
    """A mean is within twice the threshold of the key, and half a step of its code more."""
    keys = np.array(walk((64, 64), mx.float16)).astype(np.float32)
    block = ref.pack_block(keys, bits, "float16", 0.4, 0, 0, "mean")
    error = ref.unpack_block(block, 64, bits, "float16") - keys
    half_step = 0 if block.grid is None else block.grid[1] / 2 * 1.01
    assert (np.abs(error) <= 0.8 + half_step + 1e-3).all()
    means, starts = ref.mean_block(keys, 0.4, 0, 0)
    assert block.count == starts.sum()
    if bits == 16:
        np.testing.assert_allclose(error, means - keys, atol=2e-3)
    if bits > 2:  # a step of two bits is far above the threshold
        firsts = ref.pack_block(keys, bits, "float16", 0.4, 0, 0, "first")
        error_of_firsts = ref.unpack_block(firsts, 64, bits, "float16") - keys
        assert np.square(error).sum() < 0.8 * np.square(error_of_firsts).sum()


@each_run_value
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_largest_change_is_not_clipped(bits, run_value):
    keys = np.zeros((16, 16), np.float32)
    keys[9, 3] = 1000.0
    block = ref.pack_block(keys, bits, "float16", 0.5, 0, 0, run_value)
    assert ref.unpack_block(block, 16, bits, "float16")[9, 3] == pytest.approx(1000, rel=2e-3)


def test_a_float32_model_is_rounded_to_float16():
    values = mx.array([1.0, 1e6, -1e6, mx.inf, -mx.inf, mx.nan, 1 + 2**-12])
    stored = packing.to_storage(values)
    wanted = [1.0, 65504, -65504, np.inf, -np.inf, np.nan, 1.0]
    np.testing.assert_array_equal(np.array(stored), np.array(wanted, np.float16))
    with pytest.raises(ValueError, match="must be float16, bfloat16 or float32"):
        packing.to_storage(mx.array([1]))


# delta_encode.


@every_run
@each_run_value
@pytest.mark.parametrize("bits", [16, 4])
def test_encode(bench: MetalBench, bits, run_value, options):
    setting = config(bits, sinks=70, run_value=run_value)
    keys = walk((2, 3, 128, 64), mx.float16)
    with on_bench(bench, **options):
        assert_encoded(pack_kernel.encode(keys, setting, 0), keys, setting)


@each_width
@each_half
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_encode_shapes(bench: MetalBench, bits, dtype, head_dim):
    size = {64: 64, 80: 8, 96: 16, 128: 64, 256: 32}[head_dim]
    setting = config(bits, block_size=size, window=0, sinks=3 * size + 2)
    keys = walk((1, 1, 2 * size, head_dim), dtype)
    with on_bench(bench):
        assert_encoded(pack_kernel.encode(keys, setting, 2), keys, setting, 2)


@each_half
@each_run_value
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 3])
def test_encode_special_keys(bench: MetalBench, bits, run_value, dtype, kind):
    setting = config(bits, block_size=16, window=0, run_value=run_value)
    keys = special_keys(kind, (1, 2, 32, 80), dtype)
    with on_bench(bench):
        assert_encoded(pack_kernel.encode(keys, setting, 0), keys, setting)


def encode_on(setting: DeltaConfig, kind: str = "") -> None:
    """Small cases that between them use every part of the kernel."""
    shape = (1, 2, 16, 80)
    keys = special_keys(kind, shape, mx.float16) if kind else walk(shape, mx.float16)
    assert_encoded(pack_kernel.encode(keys, setting, 0), keys, setting)


ENCODE_MUTATIONS = [
    *(without_barrier(n) for n in (1, 2, 3)),
    Mutation(
        "threads without a channel",
        "const bool has_channel = d < D;",
        "const bool has_channel = true;",
    ),
    Mutation(
        "any change counts",
        "t >= sinks && abs(key - held) <= threshold",
        "t >= sinks && key == held",
    ),
    Mutation("sinks are averaged", "Mean && t >= sinks", "Mean"),
    Mutation("means on first values", "Mean && t >= sinks", "t >= sinks"),
    Mutation("codes are compared", "Mean ? key : delta_stored", "delta_stored"),
    Mutation("keys are compared", "Mean ? key : delta_stored", "true ? key : delta_stored"),
    Mutation("equal keys are no run", "Mean ? !keep : !(next == held)", "!(next == held)"),
    Mutation("equal codes are a run", "Mean ? !keep : !(next == held)", "!keep"),
    Mutation("a run past the block's end", "end < Size && !", "!"),
    Mutation("a run past its end", "!((words[end * W] >> lane) & 1u)", "true"),
    Mutation("another channel's runs", "words[end * W] >> lane", "words[end * W] >> (lane ^ 1u)"),
    Mutation("words of the first channels", "keys + d, words + simdgroup", "keys + d, words"),
    Mutation(
        "the sum of all, not of differences", "float(keys[end * D]) - first", "float(keys[end * D])"
    ),
    Mutation("no division", "total / float(end - t)", "total"),
    Mutation("the first does not count", "total / float(end - t)", "total / float(end - t - 1)"),
    Mutation(
        "below instead of up to", "abs(key - held) <= threshold", "abs(key - held) < threshold"
    ),
    Mutation("a NaN is held", "abs(key - held) <= threshold", "!(abs(key - held) > threshold)"),
    Mutation("sinks are held", "t >= sinks && ", ""),
    Mutation("compared with the last key", "held = next;", "held = key;"),
    Mutation("step rounded to nearest", "if (float(nearest) < exact)", "if (false)"),
    Mutation("an infinity gets a grid", "usable = usable && abs(key) < INFINITY;", ""),
    Mutation("no step in the code", "(key - low) / step", "(key - low)"),
    Mutation("codes rounded down", "/ step + 0.5f", "/ step"),
    Mutation(
        "scan past the words",
        "index < Size * W ? popcount(words[index]) : 0u",
        "popcount(words[index])",
    ),
    Mutation("starts past the end", "if (index < Size * W) {", "if (true) {"),
    Mutation("no carry between words", "total += simd_sum(bits);", "total = simd_sum(bits);"),
    Mutation(
        "inclusive places",
        "popcount(word & lanes_before(lane));\n        float value",
        "popcount(word & (lanes_before(lane) + 1u));\n        float value",
    ),
    Mutation("sinks count as zeros", "index / W >= counted_from ? bits : 0u", "bits"),
    Mutation("words past the end", "w * per_word < total; w +=", "w < total; w +="),
    Mutation("codes past the end", " && w * per_word + i < total", ""),
]


@pytest.mark.parametrize("mutation", ENCODE_MUTATIONS, ids=str)
def test_encode_mutations(bench: MetalBench, mutation):
    def cases() -> None:
        encode_on(config(4, block_size=16, window=0, sinks=3))
        encode_on(config(4, block_size=16, window=0, sinks=0, threshold=0.0), "constant")
        encode_on(config(3, block_size=16, window=0), "nan")
        encode_on(config(4, block_size=16, window=0), "inf")
        encode_on(config(16, block_size=16, window=0), "nan")
        encode_on(config(16, block_size=16, window=0, threshold=2.0, **absolute), "steps")
        encode_on(config(4, block_size=16, window=0, sinks=3, run_value="first"))
        encode_on(config(3, block_size=16, window=0, threshold=0.1, run_value="first"))

    absolute = {"threshold_mode": "absolute"}
    assert_caught(source_of("encode_kernel"), mutation, with_kernel(bench, "encode_kernel", cases))


# delta_unpack.


def packed_pair(bits: int, keys: mx.array, **changes) -> tuple[DeltaConfig, PackedBlocks]:
    setting = config(bits, **changes)
    return setting, end_to_end(packing.pack_blocks(keys, setting, 0), setting, keys)


@every_run
@pytest.mark.parametrize("bits", [16, 4])
def test_unpack(bench: MetalBench, bits, options):
    keys = walk((2, 3, 192, 64), mx.float16)
    setting, packed = packed_pair(bits, keys)
    with on_bench(bench, **options):
        assert_unpacked(pack_kernel.unpack(packed, 2), keys[:, :, :128], setting)


@each_width
@each_half
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_unpack_shapes(bench: MetalBench, bits, dtype, head_dim):
    size = {64: 64, 80: 8, 96: 16, 128: 64, 256: 32}[head_dim]
    keys = walk((1, 2, 4 * size, head_dim), dtype)
    _, packed = packed_pair(bits, keys, block_size=size, window=0)
    with on_bench(bench):
        got = pack_kernel.unpack(packed, 4)
    assert mx.array_equal(got, packing.unpack_blocks(packed))


@each_half
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 2])
def test_unpack_special_keys(bench: MetalBench, bits, dtype, kind):
    keys = special_keys(kind, (1, 2, 64, 80), dtype)
    setting, packed = packed_pair(bits, keys, block_size=16, window=0)
    with on_bench(bench):
        assert_unpacked(pack_kernel.unpack(packed, 4), keys, setting)


UNPACK_MUTATIONS = [
    without_barrier(1),
    Mutation("mask past the end", "i < (Size - 1) * W", "i < Size * W"),
    Mutation("threads without a channel", "if (d >= D) {", "if (d >= 32 * W) {"),
    Mutation("no low", "low = Bits < 16 ? float(grid[d]) : 0.0f", "low = 0.0f"),
    Mutation("no step", "step = Bits < 16 ? float(grid[D + d]) : 0.0f", "step = 1.0f"),
    Mutation("all words count", "w < int(simdgroup) ? bits : 0u", "bits"),
    Mutation(
        "inclusive places",
        "lanes_before(lane));\n      uint field",
        "lanes_before(lane) | (1u << lane));\n      uint field",
    ),
    Mutation("no carry between tokens", "before += bits;", ""),
    Mutation(
        "wrong word", "payload[place / per_word], place)", "payload[place / per_word + 1], place)"
    ),
    Mutation("wrong bit", "(word >> lane) & 1u", "(word >> (lane ^ 1u)) & 1u"),
    Mutation("codes beyond the largest", "value > largest ? largest : value", "value"),
]


@pytest.mark.parametrize("mutation", UNPACK_MUTATIONS, ids=str)
def test_unpack_mutations(bench: MetalBench, mutation):
    keys = walk((1, 2, 64, 80), mx.float16)
    setting, packed = packed_pair(3, keys, block_size=16, window=0)
    extreme = special_keys("extreme", (1, 1, 64, 80), mx.float16)
    hard_setting, hard = packed_pair(3, extreme, block_size=16, window=0)

    def cases() -> None:
        assert_unpacked(pack_kernel.unpack(packed, 4), keys, setting)
        assert_unpacked(pack_kernel.unpack(hard, 4), extreme, hard_setting)

    assert_caught(source_of("unpack_kernel"), mutation, with_kernel(bench, "unpack_kernel", cases))


@fast_runs
def test_round_trip_on_the_bench(bench: MetalBench, options):
    setting = config(8)
    keys = walk((1, 2, 256, 64), mx.bfloat16)
    with on_bench(bench, **options):
        encoded = pack_kernel.encode(keys, setting, 0)
        assert_unpacked(pack_kernel.unpack(end_to_end(encoded, setting, keys), 4), keys, setting)


def test_encode_reads_and_writes_what_it_must(bench: MetalBench):
    """The keys, once from memory; the masks, and the words in use."""
    if bench.on_gpu:
        pytest.skip("the GPU does not count")
    setting, keys = config(4), walk((1, 2, 256, 64), mx.float16)
    seen = {}

    source = source_of("encode_kernel")

    def counting(**call):
        outputs = bench.run(source, mode="checked", **UNWRITTEN, **call)
        seen.update(outputs.traffic)
        return outputs

    with on_bench(bench), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_kernel, "encode_kernel", lambda: counting)
        encoded = pack_kernel.encode(keys, setting, 0)
    assert seen["keys"].loaded_per_threadgroup == keys.nbytes
    words = sum(len(block.payload) for _, block in packed_blocks(keys, setting))
    assert seen["payload"].stored == 4 * words
    assert seen["masks"].stored == encoded.masks.nbytes
