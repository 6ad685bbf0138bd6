"""tile_pack, tile_score and tile_attention on the bench, against specification and operations."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention import choice
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.ops import tiles_kernel
from mlx_delta.ops.backend import METAL
from mlx_delta.ops.tiles import TileCount, tile_attention

from ..gpus import seems_to_have
from ..metal_cpu import MetalBench
from .common import as_float, every_run, on_bench, source_of
from .tile_case import (
    BF16,
    HALF,
    LISTED,
    SCALE,
    SMALL,
    Case,
    check_attention,
    check_choice,
    check_pack,
    drifting,
    small_launches,
)


@every_run
def test_each_way_of_running(bench: MetalBench, options):
    with small_launches(), on_bench(bench, **options):
        check_attention(SMALL, LISTED)
        check_choice(replace(SMALL, end=80))
        check_pack(drifting(2, 32, 40), 32)


@pytest.mark.parametrize("end", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("start", [0, 16, 21])
@pytest.mark.parametrize("window_blocks", [0, 2])
def test_ends_and_offsets(bench: MetalBench, start, end, window_blocks):
    with small_launches(), on_bench(bench):
        case = Case(start + end, start, window_blocks=window_blocks, value_dim=16)
        check_attention(case)
        blocks = case.blocks.stop - case.blocks.start
        check_attention(case, (case.blocks.start, blocks))


@pytest.mark.parametrize(
    "case",
    [
        Case(200, 64, (2, 2), 64, 64, 64, dtype=HALF),
        Case(140, 10, (4, 1), 128, 128, 64, dtype=HALF),
        Case(130, 0, (8, 1), 80, 48, 32, dtype=BF16),
        Case(130, 64, (1, 1), 96, 128, 64, dtype=BF16),
        Case(100, 32, (2, 1), 256, 256, 32, dtype=HALF),
        Case(70, 32, (1, 1), 256, 192, 32),
        Case(200, 0, (2, 1), 64, 64, 128, 0),
    ],
    ids=str,
)
def test_attention_of_types_and_dimensions(bench: MetalBench, case):
    with on_bench(bench):
        check_attention(case, (case.blocks.start + 1, 1))


@pytest.mark.parametrize(
    "case",
    [
        Case(320, 64, (2, 2), 64, size=64, dtype=HALF),
        Case(160, 0, (3, 1), 128, size=32, dtype=HALF, rows=2),
        Case(160, 32, (32, 1), 64, size=32, dtype=BF16),
        Case(128, 96, (1, 1), 256, size=32, dtype=BF16),
        Case(512, 256, (1, 1), 32, size=128, window_blocks=0),
        Case(1360, 1344, (1, 1)),  # more tiles than a simdgroup has lanes
    ],
    ids=lambda c: f"{c.dtype} {c.head_dim} of {c.size}, {c.heads[0]} heads".replace(
        "mlx.core.", ""
    ),
)
def test_choice_of_types_and_dimensions(bench: MetalBench, case):
    with on_bench(bench):
        check_choice(case)


@pytest.mark.parametrize("mass", [0.0, 0.35, 0.9, 1.0, 2.0])
def test_choice_of_masses(bench: MetalBench, mass):
    with on_bench(bench):
        check_choice(SMALL_CHOICE, mass)


SMALL_CHOICE = Case(160, 32, window_blocks=0)


def test_equal_shares_are_taken_from_the_first_on(bench: MetalBench):
    """Blocks of keys that are all alike: only so many as the mass needs."""
    case = Case(160, 144, window_blocks=0)
    queries, near, far, values = (as_float(x) for x in case.arrays)
    far[:, :, :144] = np.tile(far[:, :, 16:32], (1, 1, 9, 1))
    case.__dict__["arrays"] = tuple(mx.array(x) for x in (queries, near, far, values))
    with on_bench(bench):
        for mass in (0.5, 0.7, 0.9):
            check_choice(case, mass)
        tiles = case.choose(0.7)
    chosen = case.lists(tiles, 0, 0, 9)
    assert 1 < chosen.sum() < 9 and chosen[: chosen.sum()].all()


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
def test_packing_of_types(bench: MetalBench, dtype):
    with on_bench(bench):
        check_pack(drifting(2, 64, 96, dtype), 64)


def test_keys_that_are_not_finite_make_as_many_pieces(bench: MetalBench):
    keys = as_float(drifting(2, 64, 96))
    keys[0, 1, 3:60, 2] = np.nan
    keys[0, 1, 70:90, 2] = np.inf
    with on_bench(bench):
        _, bias, _ = tiles_kernel.pack(mx.array(keys).astype(BF16), 2, 64)
    np.testing.assert_allclose((2 ** np.array(bias)).sum(axis=-1), 64, rtol=1e-5)


def test_many_blocks_are_scored_in_several_launches(bench: MetalBench):
    with on_bench(bench), mock.patch.object(tiles_kernel, "SCRATCH_BYTES", 1 << 13):
        check_choice(SMALL_CHOICE)


def test_agrees_with_the_operations_however_the_queries_are_cut(bench: MetalBench):
    case = Case(192, 32)
    queries, near, far, values = case.arrays
    chunk = queries[:, :, 16:160]
    whole, count = TileCount(), TileCount()
    expected = tile_attention(chunk, near, values, SCALE, 48, case.far, 0.6, whole)
    with on_bench(bench):
        for cuts in ([0, 160], [0, 48, 160]):
            count = TileCount()
            parts = [
                tiles_kernel.tile_attention(
                    queries[:, :, left:right],
                    *(near, values, SCALE, 32 + left, case.far),
                    (16 - left if left == 0 else 0, right - left),
                    *(0.6, count),
                )
                for left, right in zip(cuts, cuts[1:], strict=False)
            ]
            found = mx.concatenate(parts, axis=2)
            np.testing.assert_allclose(found[:, :, 16:], expected, atol=1e-5)
            assert count == whole and whole.computed < whole.all


@pytest.mark.parametrize("key_bits", [None, 4])
def test_a_cache_that_asks_for_tiles_gets_the_kernels(
    bench: MetalBench, key_bits, tiles_from_the_start
):
    """Held keys far, full keys near, the beginning and the prompt's end exact."""
    config = DeltaConfig(block_size=32, window=32, key_bits=key_bits, prefill="tiles", tiles=0.5)
    case = Case(420, head_dim=16, value_dim=16, size=32, dtype=HALF)
    queries, near, _, values = (x[:, :, :420] for x in case.arrays)

    def run() -> tuple[mx.array, TileCount]:
        cache = DeltaKVCache(config)
        cache.prompt_length = 420
        parts = []
        for left, right in ((0, 96), (96, 300), (300, 420)):
            part = slice(left, right)
            step = queries[:, :, part], near[:, :, part], values[:, :, part]
            parts.append(delta_attention(*step, cache, SCALE))
        return mx.concatenate(parts, axis=2), cache.tile_count

    expected, whole = run()
    with on_bench(bench):
        found, count = run()
    np.testing.assert_allclose(as_float(found), as_float(expected), atol=2e-2)
    assert 0 < count.computed < count.all == whole.all
    assert abs(count.computed - whole.computed) <= 2


def test_what_the_kernels_do_not_take_is_said_once():
    step = mock.Mock()
    step.stored_values.head_dim, step.stored_values.differs = 64, False
    choice._warn.cache_clear()
    with seems_to_have(METAL):
        assert choice.tiles_by_kernel(mx.zeros((1, 2, 64, 64)), step, 1.0)
        with pytest.warns(UserWarning, match="tiles without the kernels: keys have dimension 36"):
            assert not choice.tiles_by_kernel(mx.zeros((1, 2, 64, 36)), step, 1.0)
    assert not choice.tiles_by_kernel(mx.zeros((1, 2, 64, 64)), step, 1.0), "no kernels here"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": mx.zeros((1, 3, 160, 8))}, "do not fit 2 kv heads"),
        ({"queries": mx.zeros((1, 6, 160, 16))}, "keys must have shape .*16"),
        ({"queries": mx.zeros((6, 160, 8))}, "queries must have shape"),
        ({"queries": mx.zeros((1, 6, 160, 8), mx.int32)}, "queries are of type .*int32"),
        ({"queries": mx.zeros((1, 6, 168, 8))}, "there are 199 keys for queries at 32 to 200"),
        ({"values": mx.zeros((1, 2, 100, 8))}, "there are 100 values"),
        ({"values": mx.zeros((1, 2, 199, 12))}, "values have dimension 12"),
        ({"far": mx.zeros((1, 2, 100, 8))}, "there are 100 far keys of 160"),
        ({"far": mx.zeros((1, 1, 199, 8))}, "far.keys must have shape"),
        ({"scored": (8, 160)}, "must be whole blocks of 16 but are 40 to 192"),
        ({"scored": (16, 16)}, "must be whole blocks"),
        ({"scored": (16, 176)}, "must be whole blocks"),
        ({"scale": 0.0}, "the factor on scores is 0.0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    case = Case(192, 32)
    queries, near, far, values = case.arrays
    arrays = {"queries": queries, "keys": near, "values": values, "far": far} | change
    with pytest.raises(ValueError, match=rf"^\[tile_attention\] .*{message}"):
        tiles_kernel.tile_attention(
            *(arrays["queries"], arrays["keys"], arrays["values"], change.get("scale", SCALE), 32),
            replace(case.far, keys=arrays["far"]),
            *(change.get("scored", (16, 160)), 0.6, TileCount()),
        )


def test_every_tile_is_read_once_by_each_threadgroup(bench: MetalBench):
    """Bytes: those of docs/kernels.md, and nothing else."""
    if bench.on_gpu:
        pytest.skip("the GPU does not count")
    case = Case(96, 0, (6, 2), 16, 8, window_blocks=0)
    tiles = case.some_tiles(2, 4)
    kernel = source_of("tile_attention_kernel")
    seen = []

    def recording(**call):
        seen.append(bench.run(kernel, mode="checked", **call))
        return seen[-1]

    with mock.patch.object(tiles_kernel, "tile_attention_kernel", lambda: recording):
        case.attend(tiles)
    traffic = seen[0].traffic
    far = 2 * 1 + int(tiles.counts.sum().item())  # of block 1, which has no list, and of the others
    assert traffic["queries"].loaded == case.arrays[0].nbytes
    assert traffic["near"].loaded == 2 * 6 * 16 * 16 * 4
    assert traffic["far"].loaded == far * 16 * 16 * 4
    assert traffic["values"].loaded == (2 * 6 + far) * 16 * 8 * 4
    assert traffic["out"].stored == 6 * 96 * 8 * 4
