"""deltas_decode: attention straight from held keys by lanes, against the specification."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.ops import deltas_kernel, far_kernel
from mlx_delta.ops.deltas import read_structure

from ..gpus import seems_to_have
from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import CHECKED, FAST, UNWRITTEN, name_of, on_bench, source_of, with_kernel
from .delta_case import DeltaCase, assert_close, check, lanes

FOUR = lanes()


def one(length: int, **changes: Any) -> DeltaCase:
    """A case with four queries to a simdgroup, all of which take the same compiled kernel."""
    default = {"setting": FOUR, "heads": (8, 2), "dtype": mx.float16}
    return DeltaCase(lengths=(length,), **{**default, **changes})


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> None:
    """For what compiles the kernel once more, and finds what others find."""
    if not request.config.getoption("--all"):
        pytest.skip("every form of the kernel takes a minute; --all does")


def test_one_query(bench: MetalBench):
    check(bench, one(300), **CHECKED[0])


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize("options", [*FAST, *CHECKED[1:]], ids=name_of)
def test_other_runs(bench: MetalBench, options):
    check(bench, one(300), **options)


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize("length", [191, 193, 600])
def test_lengths(bench: MetalBench, length):
    """One far block, two, and more than are read at once."""
    check(bench, one(length))


def test_wide_codes(bench: MetalBench):
    """Two windows a token, lanes that are too many, rows that differ, and a mask."""
    setting = lanes((6, 5, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2), (8, 2), (4, *(3,) * 11))
    check(bench, DeltaCase(setting, (2, 300, 130), 2, (4, 2), 96, mx.float32), mask=True)


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize(
    ("widths", "values", "head_dim", "heads", "dtype"),
    [
        ((4, 4, 4, 3, 3, 3, 3, 2, 2, 2), None, 80, (4, 2), mx.float16),  # values are plain
        ((7, 5, *(3,) * 14), (4, 4), 128, (2, 2), mx.bfloat16),
        ((4,) * 18, None, 144, (2, 2), mx.float16),
        ((4,) * 32, (4,), 256, (4, 1), mx.float16),
    ],
    ids=["D 80", "D 128", "D 144", "D 256"],
)
def test_forms(bench: MetalBench, widths, values, head_dim, heads, dtype):
    check(bench, DeltaCase(lanes(widths, values), (330,), 1, heads, head_dim, dtype))


@pytest.mark.usefixtures("thorough")
def test_eight_queries_without_sinks(bench: MetalBench):
    """Some of which see a block as it is held, others in full; two simdgroups share a head."""
    check(bench, one(260, steps=8, heads=(2, 2), setting=lanes(sinks=0)))


@pytest.mark.usefixtures("thorough")
def test_what_is_not_finite_shows(bench: MetalBench):
    case = one(200, kind="nan")
    with on_bench(bench):
        output = case.step(case.cache())
    assert np.isnan(output).all()


@pytest.mark.usefixtures("thorough")
def test_loads_what_it_must_and_no_more(bench: MetalBench):
    """At most 1.2 times the stored bytes of far keys by all threadgroups together."""
    if bench.on_gpu:
        pytest.skip("the GPU does not count")
    case = one(700)
    cache, traffic = case.cache(), {}
    source = source_of("deltas_kernel")

    def run(**call: Any) -> Any:
        outputs = bench.run(source, mode="checked", **UNWRITTEN, **call)
        traffic.update(outputs.traffic)
        return outputs

    stored = cache._keys.log.read_bytes(9)
    names = ("payload", "offsets", "low", "steps", "sequence")
    with on_bench(bench), mock.patch.object(deltas_kernel, "deltas_kernel", lambda: run):
        output = case.step(cache)
    assert_close(output, case.expected(), case)
    loaded = sum(traffic[n].loaded_per_threadgroup for n in names)
    assert loaded <= 1.2 * stored, f"{loaded} bytes for {stored}"


BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
SHUFFLED = "simd_shuffle(before, ushort(sub * Own + lane % Own))"
MUTATIONS = [
    *(without_barrier(n, BARRIER) for n in (2, 3)),
    Mutation("no zero of codes", "- DELTA_ZERO * step", ""),
    Mutation("no low", "low[j] += query[k][j] * base;", ""),
    Mutation("no step", "query[k][j] *= step;", ""),
    Mutation("every lane held", "is_held ? payload[masks + g] : 0xffffffffu", "payload[masks + g]"),
    Mutation("masks of one chunk", "masks += masks_at.y;", ""),
    Mutation("codes of one chunk", "stream += bits_at.y;", ""),
    Mutation("codes of the first lane", "stream + bits_at.x", "stream"),
    Mutation("places in two blocks", "own - first, last - first", "own, last - first"),
    Mutation("lanes that are too many", SHUFFLED, "before"),
    Mutation("one width", "window >>= width;", "window >>= 4;"),
    Mutation("the next code too", "window & most", "window & (most * 2 + 1)"),
    Mutation("one window for all", "funnel_right(window, after, taken)", "window"),
    Mutation("no second window", "funnel_right(from[1], from[2], at & 31u)", "0u"),
    Mutation("nothing held", "if (bits & (1u << k)) {", "if (true) {"),
    Mutation("a word only", "from[0], from[1], at", "from[0], from[0], at"),
    Mutation("half of the lanes", "total[j] += simd_shuffle_xor(total[j], ushort(other));", ""),
    Mutation("a strip's scores", "chunk + strip + lane", "chunk + lane"),
    Mutation("one block's scores", "sub * CODED_TOKENS + token", "token"),
    Mutation("scores where they are stored", "* CODED_TOKENS + token, total",
             "* CODED_TOKENS + place, total"),
    Mutation("one block's sequence", "sequence[min(sub, count - 1) * CODED_TOKENS + place]",
             "sequence[place]"),
    Mutation("the sequence of a block behind the last", "sequence[min(sub, count - 1) *",
             "sequence[sub *"),
    Mutation("the first block's sequence", "far.sequence + long(block) * CODED_TOKENS",
             "far.sequence"),
    Mutation("one head's sequences", "sequence + long(head) * low_shape[2] * 64", "sequence"),
    Mutation("one block's weights", "number * CODED_TOKENS + first", "first"),
    Mutation("blocks past the last", ", count - 1);", ", 99);"),
    Mutation("the first block", "uint(far.offsets[block])", "uint(far.offsets[0])"),
    Mutation("one row's words", "long(head / near_shape[1]) * payload_shape[1]", "0"),
    Mutation("one head's blocks", "offsets + long(head) * low_shape[2]", "offsets"),
    Mutation("one head's low", "low + long(head) * low_shape[2] * D", "low"),
    Mutation("one head's widths", "head % near_shape[1] * (D / 8)", "0"),
]  # fmt: skip


def small_case() -> None:
    """Every part of the kernel: queries on both sides of a border, rows and heads that differ."""
    setting = lanes((6, 6, 5, 4, 4, 3, 3, 3, 2, 2, 2, 2), (2, 3), (5, *(4,) * 9, 3, 3), level=0.03)
    case = DeltaCase(setting, (130, 258), 3, (2, 2), 96, mx.float16)
    # Some lanes change with every token, and are not held.
    noise = 4 * np.random.default_rng(0).normal(size=case.keys.shape)
    assert setting.key_widths is not None and setting.key_widths[0] is not None
    wild = np.array([width == "6" for width in setting.key_widths[0][0]])
    case.keys = mx.where(mx.array(wild), mx.array(noise).astype(mx.float16), case.keys)
    cache = case.cache()
    moved = (np.array(cache._keys.log.parts["sequence"]) != np.arange(64)).any(axis=3)
    assert moved[1, :, 1:3].all() and not moved[1, :, 0].any(), "sinks are in the first block"
    decode = deltas_kernel.decode

    def tight(queries: Any, rows: Any, blocks: Any, near: Any, *rest: Any) -> Any:
        """With arrays that end where what is looked at does."""
        done = [n for _, n, _, _ in rows]
        stops = np.array(blocks.offsets + read_structure(blocks)[2])
        words = 2 + max(int(stops[row, :, :n].max()) for row, n in enumerate(done))
        blocks = dataclasses.replace(blocks.first(max(done)), payload=blocks.payload[:, :words])
        return decode(queries, rows, blocks, near, *rest)

    with (
        mock.patch.object(far_kernel, "gpu_simdgroups", lambda: 8),
        mock.patch.object(deltas_kernel, "decode", tight),
    ):
        output = case.step(cache)
    with seems_to_have(None):
        wanted = case.step(case.cache())
    np.testing.assert_allclose(output, wanted, atol=2e-2)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    test = with_kernel(bench, "deltas_kernel", small_case)
    assert_caught(source_of("deltas_kernel"), mutation, test)
