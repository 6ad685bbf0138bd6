"""delta_decode: attention straight from packed storage, against the specification."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.ops import decode_kernel

from ..gpus import seems_to_have
from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import (
    UNWRITTEN,
    as_float,
    config,
    each_type,
    every_run,
    fast_runs,
    on_bench,
    source_of,
    with_kernel,
)
from .decode_case import Case, assert_close, check

SMALL = config(4, block_size=8, window=8, sinks=3)


@every_run
@pytest.mark.parametrize("bits", [16, 4])
def test_one_query(bench: MetalBench, bits, options):
    case = Case(config(bits, block_size=16, window=16, value_bits=bits), (90,))
    check(bench, case, **options)


@each_type
@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, None), (16, 16), (4, 4), (2, 8)])
def test_types_and_widths(bench: MetalBench, dtype, key_bits, value_bits):
    check(bench, Case(config(key_bits, value_bits=value_bits), (333,), dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, None), (3, 4)])
def test_head_dims(bench: MetalBench, head_dim, key_bits, value_bits):
    value_bits = 16 if head_dim == 80 else value_bits
    setting = config(key_bits, value_bits=value_bits)
    check(bench, Case(setting, (200,), head_dim=head_dim, dtype=mx.float16))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 2), (5, 1), (32, 2)], ids=str)
@pytest.mark.parametrize("steps", [1, 8])
def test_head_groupings(bench: MetalBench, heads, steps):
    check(bench, Case(config(4, value_bits=4), (150,), steps, heads))


@pytest.mark.parametrize("length", [17, 63, 64, 65, 66, 67, 1000])
@pytest.mark.parametrize("steps", [1, 3])
def test_lengths(bench: MetalBench, length, steps):
    """Queries of one step lie on both sides of a block's border, or on one."""
    check(bench, Case(SMALL, (length,), steps))


@fast_runs
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "mask"])
def test_ragged_rows(bench: MetalBench, mask, options):
    case = Case(SMALL, (1, 65, 1000, 2, 64), dtype=mx.float16)
    check(bench, case, mask, **options)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_rows(bench: MetalBench, rows):
    lengths = tuple(63 + 9 * row for row in range(rows))
    check(bench, Case(config(16, block_size=8, window=0), lengths, 2, (2, 1)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ragged_rows_checked(bench: MetalBench, seed):
    case = Case(dataclasses.replace(SMALL, value_bits=4), (2, 40, 65), 2, (2, 1))
    check(bench, case, True, mode="checked", seed=seed)


@each_type
@pytest.mark.parametrize("kind", ["constant", "alternating", "extreme"])
@pytest.mark.parametrize("bits", [16, 4])
def test_special_keys(bench: MetalBench, bits, kind, dtype):
    scale = 1e-6 if kind == "extreme" else 0.2
    check(
        bench,
        Case(config(bits, block_size=16, window=16), (90,), 1, dtype=dtype, kind=kind, scale=scale),
    )


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("bits", [16, 4])
def test_what_is_not_finite_shows(bench: MetalBench, bits, kind):
    """NaN comes out as NaN. With codes an infinity does too; at 16 bits it weighs as it should."""
    case = Case(config(bits, block_size=16, window=16), (90,), kind=kind)
    cache = case.cache()
    with on_bench(bench):
        output = case.step(cache)
    if bits == 16:
        assert_close(output, case)
    else:
        assert np.isnan(output).all()


@pytest.mark.parametrize(
    "changes",
    [{"sinks": 0}, {"sinks": 40}, {"window": 0}, {"window": 48}, {"threshold": 0.0}],
    ids=str,
)
def test_settings(bench: MetalBench, changes):
    check(bench, Case(config(4, **{"block_size": 16, "window": 16, **changes}), (100,), 2))


def test_rewound_to_the_first_token(bench: MetalBench):
    case = Case(SMALL, (100,))
    cache = case.cache()
    cache.trim(99)
    case.lengths = (1,)
    with on_bench(bench):
        output = case.step(cache)
    assert_close(output, case)


def test_decode_goes_on_from_token_to_token(bench: MetalBench):
    """Blocks are finished, packed and moved together while text is generated."""
    cases = [Case(SMALL, (length,), heads=(2, 1)) for length in range(60, 90)]
    whole = Case(SMALL, (89,), heads=(2, 1))
    for case in cases:
        case.keys, case.values = whole.keys, whole.values
    cache = cases[0].cache()
    twin = copy.deepcopy(cache)
    with on_bench(bench):
        for case in cases:
            assert_close(case.step(cache), case)
    for case in cases:
        case.step(twin)
    for ours, theirs in zip(cache.keys_and_values(), twin.keys_and_values(), strict=True):
        assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_text_on_the_bench_alone(bench: MetalBench, bits):
    """Prompt in chunks, then tokens: encoded, unpacked and decoded by the kernels only."""
    case = Case(config(bits, block_size=16, window=16, value_bits=bits), (90,), 3, head_dim=32)
    caches = [DeltaKVCache(case.setting) for _ in range(2)]
    outputs = []
    for cache, where in zip(caches, (on_bench(bench), contextlib.nullcontext()), strict=True):
        with where:
            for start, end in ((0, 40), (40, 87)):
                queries = mx.repeat(case.keys[:, :, start:end], 2, axis=1)
                part = (x[:, :, start:end] for x in (case.keys, case.values))
                outputs.append(as_float(delta_attention(queries, *part, cache, case.scale)))
            outputs.append(case.step(cache))
    for ours, twins in zip(outputs[:3], outputs[3:], strict=True):
        np.testing.assert_allclose(ours, twins, atol=2e-5)
    for ours, twins in zip(*(cache.keys_and_values() for cache in caches), strict=True):
        assert mx.array_equal(ours, twins)


def test_splits_do_not_matter(bench: MetalBench):
    for threadgroups in (1, 3, 1000):
        with mock.patch.object(decode_kernel, "THREADGROUPS", threadgroups):
            check(bench, Case(SMALL, (100,), 2, (2, 1)))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 16), (8, 8), (4, 4), (2, 4)])
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)], ids=str)
def test_loads_what_it_must_and_no_more(bench: MetalBench, key_bits, value_bits, heads):
    """At most 1.1 times the packed bytes, counted over all threads; and two launches."""
    if bench.on_gpu:
        pytest.skip("the GPU does not count")
    case = Case(config(key_bits, value_bits=value_bits), (700,), heads=heads, dtype=mx.float16)
    cache = case.cache()
    traffic: dict[str, Any] = {}
    launches = []

    def counting(builder: str):
        source = source_of(builder)

        def run(**call: Any) -> Any:
            launches.append(builder)
            outputs = bench.run(source, mode="checked", **UNWRITTEN, **call)
            traffic.update({} if builder == "reduce_kernel" else outputs.traffic)
            return outputs

        return run

    decode, reduce = counting("decode_kernel"), counting("reduce_kernel")
    with (
        on_bench(bench),
        mock.patch.object(decode_kernel, "decode_kernel", lambda: decode),
        mock.patch.object(decode_kernel, "reduce_kernel", lambda: reduce),
    ):
        output = case.step(cache)
    assert_close(output, case)
    assert launches == ["decode_kernel", "reduce_kernel"]
    packed = ("masks", "payload", "offsets", "grid", "sinks", "near", "values", "scales", "biases")
    loaded = sum(traffic[name].loaded for name in packed)
    needed = needed_bytes(cache, case)
    assert loaded <= 1.1 * needed, f"{loaded} bytes for {needed}"


def needed_bytes(cache: DeltaKVCache, case: Case) -> int:
    """Bytes of the packed blocks, of the near keys and of all values, each counted once."""
    header, (length,) = json.loads(cache.state[0]), case.lengths
    heads, D, size = case.heads[1], case.head_dim, case.setting.block_size
    (blocks,) = cache.encoded
    masks = blocks * heads * (size - 1) * D // 8
    payload = 4 * header["ends"][0][-1]
    grid = 0 if case.setting.key_bits == 16 else 4 * D * blocks * heads
    near = 2 * D * heads * (length - blocks * size)
    buffers = cache.state[2 : 5 if case.setting.value_bits in (8, 4) else 3]
    values = sum(x.nbytes // x.shape[2] for x in buffers) * length
    return masks + payload + grid + near + values + 4 * blocks * heads


DECODE_MUTATIONS = [
    *(without_barrier(n) for n in (1, 2, 3, 4)),
    Mutation("no scale", "scale * float(queries", "float(queries"),
    Mutation("queries past the last", "bool exists = q < all_queries;", "bool exists = true;"),
    Mutation("channels past the last", "exists && d < D ?", "exists ?"),
    Mutation("grid past the last", "Bits < 16 && d < D;", "Bits < 16;"),
    Mutation("no low", "low[i] = has_grid ?", "low[i] = false ?"),
    Mutation("no step", "spacing[i] = has_grid ?", "spacing[i] = false ?"),
    Mutation("mask rows past the last", "if (t > 0 && t < Size) {", "if (t > 0) {"),
    Mutation("starts past the last", "if (t < Size) {", "if (true) {"),
    Mutation("no carry between tokens", "total += simd_sum(bits);", "total = simd_sum(bits);"),
    Mutation("payload from its first word", "words + first_word, key_words", "words, key_words"),
    Mutation("tokens after the last", "min(Tile, block_tokens - first)", "Tile"),
    Mutation(
        "near keys past the last channel",
        "if (!is_packed) {\n            key[i] = d < D ?",
        "if (!is_packed) {\n            key[i] = true ?",
    ),
    Mutation("keyframe past the last channel", "D - 32 * i >= 32 ?", "true ?"),
    Mutation(
        "inclusive places",
        "uint index = before + popcount(word & lanes_before(lane));",
        "uint index = before + popcount(word & (lanes_before(lane) | (1u << lane)));",
    ),
    Mutation("no carry between words", "before += popcount(word);", ""),
    Mutation("no sinks", "token + t < sizes.sinks && d < D", "false"),
    Mutation(
        "sinks past the last channel", "token + t < sizes.sinks && d < D", "token + t < sizes.sinks"
    ),
    Mutation("one sink more", "token + t < sizes.sinks", "token + t <= sizes.sinks"),
    Mutation("no sum over lanes", "product = simd_sum(product);", ""),
    Mutation("the future", "own <= position[j] && ", ""),
    Mutation("both forms of a block", "&& (block < far[j]) == is_packed", ""),
    Mutation(
        "mask not looked at", "seen = mask[long(mask_row)", "seen = true || mask[long(mask_row)"
    ),
    Mutation("mask of another step", "* sizes.queries + step[j]", "* sizes.queries"),
    Mutation("nothing seen yet", "highest[j] == new_highest ? 1.0f :", "false ? 1.0f :"),
    Mutation("no rescaling of the output", "output[j][i] *= rescale;", ""),
    Mutation("no rescaling of the weights", "weights[j] * rescale", "weights[j]"),
    Mutation("values past the last channel", "value[i] = d < D ?", "value[i] = true ?"),
    Mutation("no scale of values", "float(code) * float(scales[group])", "float(code)"),
    Mutation("no bias of values", " + float(biases[group])", ""),
    Mutation("output of no query", "if (place[j] < 0) {", "if (false) {"),
    Mutation(
        "output past the last channel",
        "if (d < D) {\n        partial",
        "if (true) {\n        partial",
    ),
    Mutation("all rows' offsets alike", "offsets += long(head) * sizes.blocks;", ""),
    Mutation("all rows' payloads alike", "payload += long(row) * sizes.payload;", ""),
]


def decode_cases() -> None:
    """Small cases that between them use every part of the kernel."""
    blocks_of_16 = {"block_size": 16, "window": 16}
    # A block that only one of the queries sees packed; all of the packed capacity in use.
    case = Case(config(4, **blocks_of_16, value_bits=16), (49, 150), 3, (3, 1), 80)
    cache = case.cache()
    mask = cache.make_mask(case.steps)
    column = mx.arange(mask.shape[-1])
    mask = mask & (column % 5 != 2)
    mask = mask & (column >= mx.array([20, 60])[:, None, None, None])  # a split sees nothing
    cases = [
        (case, mask),
        # Several slices to a block, several blocks to a split.
        (Case(config(4, window=0, value_bits=4, sinks=17), (200,), 2, (2, 2), 32), None),
        # No more values than a keyframe's.
        (Case(config(4, **blocks_of_16, sinks=0), (40,), 1, (1, 1), 80, kind="constant"), None),
    ]
    with mock.patch.object(decode_kernel, "THREADGROUPS", 8):
        for case, mask in cases:
            cache = case.cache()
            # What was fed and taken back must not be looked at.
            wrong = mx.full((len(case.lengths), case.heads[1], 2, case.head_dim), mx.nan)
            cache.update(wrong.astype(case.dtype), wrong.astype(case.dtype))
            cache.trim(2)
            output = case.step(cache, mask)
            wanted = case.expected() if mask is None else masked(case, mask)
            np.testing.assert_allclose(output, wanted, atol=1e-4)


def masked(case: Case, mask: mx.array) -> np.ndarray:
    """The outputs that MLX operations give under a mask."""
    with seems_to_have(None):
        return case.step(case.cache(), mask)


@pytest.mark.parametrize("mutation", DECODE_MUTATIONS, ids=str)
def test_decode_mutations(bench: MetalBench, mutation):
    run = with_kernel(bench, "decode_kernel", decode_cases)
    assert_caught(source_of("decode_kernel"), mutation, run)


REDUCE_MUTATIONS = [
    Mutation("channels past the last", "if (int(d) >= D) {", "if (false) {"),
    Mutation(
        "one split less",
        "for (int s = 0; s < splits; ++s) {\n    // A",
        "for (int s = 1; s < splits; ++s) {\n    // A",
    ),
    Mutation(
        "no rescaling",
        "output += partial[s * D + int(d)] * rescale;",
        "output += partial[s * D + int(d)];",
    ),
    Mutation(
        "weights not rescaled",
        "weights += sums[s * 2 + 1] * rescale;",
        "weights += sums[s * 2 + 1];",
    ),
    Mutation("not divided by the weights", "T(output / weights)", "T(output)"),
    Mutation(
        "the first split's score", "highest = max(highest, sums[s * 2]);", "highest = sums[0];"
    ),
]


@pytest.mark.parametrize("mutation", REDUCE_MUTATIONS, ids=str)
def test_reduce_mutations(bench: MetalBench, mutation):
    run = with_kernel(bench, "reduce_kernel", decode_cases)
    assert_caught(source_of("reduce_kernel"), mutation, run)
