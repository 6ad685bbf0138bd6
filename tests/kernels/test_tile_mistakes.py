"""Mistakes planted in the tile kernels: each fails a check that the kernels themselves pass."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import as_float, source_of, with_kernel
from .tile_case import (
    LISTED,
    SMALL,
    Case,
    check_attention,
    check_choice,
    check_pack,
    drifting,
    small_launches,
)

ATTENTION = [
    without_barrier(1),
    without_barrier(2),
    without_barrier(3),
    Mutation("a key after the query", "if (key > position[f][e])", "if (key > position[f][e] + 1)"),
    Mutation("only the block's first strip is hidden", "if (tile == 0)", "if (strip == 0)"),
    Mutation("keys behind the last", "min(left, Keys)", "Keys"),
    Mutation("strips that half a block sees", "first <= last;", "first + Keys - 1 <= last;"),
    Mutation(
        "no rescaling of the output", "thread_elements()[0] *= own", "thread_elements()[0] *= 1"
    ),
    Mutation("no rescaling of the sum", "sum *= shrink;", ""),
    Mutation("the reference never rises", "top = higher;", ""),
    Mutation("weights are not turned", "row & 1 ? float2(a.y, b.y)", "row & 1 ? float2(a.x, b.y)"),
    Mutation("another row's sum", "return row & 1 ? odd : even;", "return even;"),
    Mutation(
        "near tiles from the far",
        "tile < near_tiles ? near : far",
        "tile <= near_tiles ? near : far",
    ),
    Mutation("tiles by their place", "has_list ? list[other] : other", "other"),
    Mutation("a list of another block", "long(listed) * sizes.list_room", "0"),
    Mutation("all tiles where there is a list", "(has_list ? counts[listed] : border)", "border"),
    Mutation(
        "rows that are not there",
        "exists ? r / Size * sizes.queries + step : -1",
        "r / Size * sizes.queries + step",
    ),
    Mutation("one head for all", "long(r / Size) * sizes.queries + step", "step"),
    Mutation("rows not set apart", "quad / row * (strip_row<T, D>() / QUAD)", "quad / row * row"),
]

SCORE = [
    without_barrier(1, "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"),
    without_barrier(2, "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"),
    without_barrier(3, "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"),
    without_barrier(1),
    without_barrier(2),
    Mutation(
        "queries do not count their spread",
        "bias[piece] + square[f] * spread[piece]",
        "bias[piece]",
    ),
    Mutation("counts do not count", "bias[piece] + square[f]", "0.0f + square[f]"),
    Mutation(
        "the first of four queries",
        "mean += float(own[p * D + 8 * d]);",
        "mean += float(own[8 * d]);",
    ),
    Mutation("a key after the queries", "key <= position[f][e] ?", "key <= position[f][e] + 1 ?"),
    Mutation(
        "rows that are not there",
        "r < rows; r += 32) {\n      m",
        "r < all_rows; r += 32) {\n      m",
    ),
    Mutation(
        "the first split's sums",
        "far_sum += fast::exp2(far_logs[s * all_rows + r] - top);",
        "far_sum = fast::exp2(far_logs[r] - top);",
    ),
    Mutation(
        "the mean of the rows",
        "most = fast::exp2(simd_max(most));",
        "most = simd_sum(fast::exp2(most)) / 32;",
    ),
    Mutation("shares do not add up to 1", "shares[tile] / total", "shares[tile]"),
    Mutation("the first tile may be left out", "tile == 0 || bits > least", "bits > least"),
    Mutation("all of the equal ones", "float(before) < max(equal, 1.0f)", "true"),
    Mutation("near tiles do not count", "mass - (near_share +", "mass - ("),
]

PACK = [
    without_barrier(1),
    without_barrier(2),
    without_barrier(3),
    Mutation("of equal changes the later", "change[t] && other < t)", "change[t] && other > t)"),
    Mutation("one piece more", "begin = before < Pieces - 1;", "begin = before < Pieces;"),
    Mutation(
        "half the spread's channels",
        "s < Simdgroups; ++s) {\n      square",
        "s < 1; ++s) {\n      square",
    ),
    Mutation(
        "the change of one channel",
        "sum = simd_sum(sum);\n    if (lane == 0) {\n      // As",
        "if (lane == 0) {\n      // As",
    ),
]


@pytest.mark.parametrize("mutation", ATTENTION, ids=str)
def test_mistakes_in_attention(bench: MetalBench, mutation):
    def test() -> None:
        with small_launches():
            check_attention(SMALL, LISTED)

    run = with_kernel(bench, "tile_attention_kernel", test)
    assert_caught(source_of("tile_attention_kernel"), mutation, run)


@pytest.mark.parametrize("mutation", SCORE, ids=str)
def test_mistakes_in_choosing(bench: MetalBench, mutation):
    case = Case(128, 64, size=32, window_blocks=0)
    alike = Case(160, 128, size=32, window_blocks=0)
    queries, near, far, values = (as_float(x) for x in alike.arrays)
    far[:, :, :128] = np.tile(far[:, :, 32:64], (1, 1, 4, 1))
    alike.__dict__["arrays"] = tuple(mx.array(x) for x in (queries, near, far, values))

    def test() -> None:
        with small_launches(4):  # two for each half of the rows
            check_choice(case)
            check_choice(alike)

    run = with_kernel(bench, "tile_score_kernel", test)
    assert_caught(source_of("tile_score_kernel"), mutation, run)


@pytest.mark.parametrize("mutation", PACK, ids=str)
def test_mistakes_in_packing(bench: MetalBench, mutation):
    run = with_kernel(bench, "tile_pack_kernel", lambda: check_pack(drifting(2, 32, 80), 32))
    assert_caught(source_of("tile_pack_kernel"), mutation, run)
