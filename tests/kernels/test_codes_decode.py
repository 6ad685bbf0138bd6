"""codes_decode: attention straight from coded keys and turned values, against the specification."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.ops import codes_kernel, far_kernel
from mlx_delta.ops.far_values import CodedValues

from ..gpus import seems_to_have
from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .code_case import CodedCase, assert_close, check, coded
from .common import UNWRITTEN, every_run, name_of, on_bench, source_of, with_kernel

# Of 48 pairs each; odd and even numbers of rows, and heads without some kinds.
MIXED = (
    {2: 1, 3: 3, 4: 3, 5: 1, 6: 2, 8: 1},
    {4: 12},
    {8: 6},
    {2: 24},
    {3: 5, 6: 4, 5: 1, 4: 1},
    {4: 12},
)
ONE = coded({4: 8}, (4, 4))


def one(length: int, **changes: Any) -> CodedCase:
    """A case with four queries to a simdgroup, all of which take the same compiled kernel."""
    default = {"setting": ONE, "heads": (8, 2), "dtype": mx.float16}
    return CodedCase(lengths=(length,), **{**default, **changes})


@every_run
def test_one_query(bench: MetalBench, options):
    check(bench, one(300), **options)


@pytest.mark.parametrize("length", [129, 191, 192, 193, 1000])
def test_lengths(bench: MetalBench, length):
    check(bench, one(length))


@pytest.mark.parametrize(
    ("kinds", "values", "head_dim", "heads", "dtype"),
    [
        (MIXED, (8, 6, 5, 4, 3, 2), 96, (18, 6), mx.float32),
        ((), (4, 4), 128, (2, 2), mx.bfloat16),  # keys are turned
        (({4: 10}, {5: 8}), None, 80, (4, 2), mx.float16),  # values are plain
        ({5: 8, 6: 4, 8: 8}, (4,), 256, (4, 1), mx.float16),
    ],
    ids=["all widths", "turned keys", "plain values", "D 256"],
)
def test_forms(bench: MetalBench, kinds, values, head_dim, heads, dtype):
    setting = coded(kinds, values)
    check(bench, CodedCase(setting, (200,), 1, heads, head_dim, dtype))


@pytest.mark.parametrize(("steps", "heads"), [(2, (4, 2)), (4, (2, 2))], ids=str)
def test_steps_on_both_sides_of_a_border(bench: MetalBench, steps, heads):
    """Some of the queries see a block as codes, others in full."""
    check(bench, one(129, steps=steps, heads=heads))


def test_five_queries_without_sinks(bench: MetalBench):
    """Three of them are in one simdgroup, two in another one."""
    check(bench, one(190, heads=(10, 2), setting=coded({4: 8}, (4, 4), sinks=0)))


RAGGED = CodedCase(ONE, (2, 65, 300, 130), 2, dtype=mx.float16)


def test_ragged_rows(bench: MetalBench):
    check(bench, RAGGED)


def test_mask_and_bytes(bench: MetalBench):
    """A mask; and codes of 4 bits by bytes, as for GPUs that can pick them, give the same."""
    build, cache = codes_kernel.codes_kernel.__wrapped__, RAGGED.cache()

    def with_bytes() -> Any:
        kernel = build()

        def launch(template: list[tuple[str, Any]], **call: Any) -> Any:
            changed = [(name, name == "Bytes" or value) for name, value in template]
            return kernel(template=changed, **call)

        return launch

    with on_bench(bench), mock.patch.object(codes_kernel, "codes_kernel", with_bytes):
        output = RAGGED.step(cache, cache.make_mask(RAGGED.steps))
    assert_close(output, RAGGED.expected(), RAGGED)


@pytest.mark.parametrize("changes", [{"sinks": 70}, {"window": 0}], ids=name_of)
def test_settings(bench: MetalBench, changes):
    check(bench, one(300, setting=coded({4: 8}, (4, 4), **changes)))


def test_splits_do_not_matter(bench: MetalBench):
    for simdgroups in (1, 6, 1000):
        with mock.patch.object(far_kernel, "gpu_simdgroups", lambda n=simdgroups: n):
            check(bench, one(500))


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_what_is_not_finite_shows(bench: MetalBench, kind):
    case = one(200, kind=kind)
    with on_bench(bench):
        output = case.step(case.cache())
    assert np.isnan(output).all()


def test_loads_what_it_must_and_no_more(bench: MetalBench):
    """At most 1.1 times the stored bytes by all threadgroups together; and two launches."""
    if bench.on_gpu:
        pytest.skip("the GPU does not count")
    case = one(700)
    cache, traffic, launches = case.cache(), {}, []

    def counting(builder: str):
        source = source_of(builder)

        def run(**call: Any) -> Any:
            launches.append(builder)
            outputs = bench.run(source, mode="checked", **UNWRITTEN, **call)
            traffic.update({} if builder == "combine_kernel" else outputs.traffic)
            return outputs

        return run

    first, second = counting("codes_kernel"), counting("combine_kernel")
    with (
        on_bench(bench),
        mock.patch.object(codes_kernel, "codes_kernel", lambda: first),
        mock.patch.object(far_kernel, "combine_kernel", lambda: second),
    ):
        output = case.step(cache)
    assert_close(output, case.expected(), case)
    assert launches == ["codes_kernel", "combine_kernel"]
    far, near, heads = 640, 60 + 64, 2
    # 4-bit words, a grid of 4 bytes a channel and block; values with a byte for their scale.
    needed = heads * far * (64 // 2 + 4 + 64 // 2 + 1) + heads * near * 4 * 64
    names = ("words", "grid", "sinks", "near", "near_values", "value_words", "scales")
    loaded = sum(traffic[name].loaded_per_threadgroup for name in names)
    assert loaded <= 1.1 * needed, f"{loaded} bytes for {needed}"


BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
MUTATIONS = [
    *(without_barrier(n, BARRIER) for n in (1, 2, 3, 4)),
    Mutation("no units", "unit[i] = power_of_two(-exponent);", "unit[i] = 1.0f;"),
    Mutation("no zero of codes", "- CODE_ZERO * step", ""),
    Mutation("no low", "low[j] += query[j] * base;", ""),
    Mutation("low twice", "part == 0 ? low[j] : 0.0f", "low[j]"),
    Mutation("rows not in pairs", "slots += (word_rows + 1) / 2 * 4", "slots += word_rows * 2"),
    Mutation("one head's rows", "+ far_keys.counts[CODED_KINDS]", ""),
    Mutation("one head's counts", "+ head % grid_shape[1] * CODED_COUNTS", ""),
    Mutation("queries not in the order", "order[kv_head * D + d]", "d"),
    Mutation("padding not zero", "put<Queries>(scaled, i, none);", ""),
    Mutation("words past the last row", "at = min(at + 2 * CODED_TOKENS, last);", "at += 128;"),
    Mutation("one half of the rows", "mine + simd_shuffle_xor(other, 16)", "mine"),
    Mutation("no second code of a pair", "score[t][j] += second[j] * field.y;", ""),
    Mutation("no scale", "scale * M_LOG2E_F * float", "M_LOG2E_F * float"),
    Mutation("the future", "place + i <= position && ", ""),
    Mutation("both forms of a block", " && block < far;", ";"),
    Mutation("coded sinks", "is_sink == (kind == CODED_SINKS)", "true"),
    Mutation("mask not looked at", "if (HasMask && seen) {", "if (false) {"),
    Mutation("mask of another step", "* sizes.queries + step;", "* sizes.queries;"),
    Mutation("no rescaling of outputs", "state.output[j][k] *= shrink;", ""),
    Mutation("no rescaling of sums", "state.sum[j] *= shrink;", ""),
    Mutation("no rescaling of scales", "state.scaled[g][j] *= shrink;", ""),
    Mutation("never rescaled", "if (simd_any(above)) {", "if (false) {"),
    Mutation("no zero of fields", "CODE_ZERO + 0.5f", "0.5f"),
    Mutation("no zero of values", "+ 0.5f * float((1 << Width) - 1) * power_of_two(unit)", ""),
    Mutation("no units of values", "* power_of_two(-unit)", ""),
    Mutation("scales of whole numbers", "whole_step(scale[i].e[g])",
             "float(scale[i].e[g])"),
    Mutation("another group's scales", "own * 8 / Group * CODED_TOKENS", "0"),
    Mutation("another group's sums", "group == g ? group_scaled", "g == 0 ? group_scaled"),
    Mutation("words past a value's last", "bit % 32 + 8 * Width > 32 ? 1 : 0", "1"),
    Mutation("the neighbour's codes", ">> shift) & 0xffffu", ">> shift)"),
    Mutation("one head's words", "+ heads[2 * kv_head + 1]", ""),
    Mutation("outputs of half the lanes", "half_way = coded_step<D>() / 2", "half_way = 0"),
    Mutation("output of no query", "if (q >= all_queries) {", "if (false) {"),
    Mutation("values behind the last", "min(CODED_TOKENS, last + 1 - token)", "64"),
    Mutation("keys behind the last", "sinks - 1 : last_position", "sinks - 1 : 1 << 20"),
    Mutation("one row's near keys", "long(head) * sizes.room - near_first", "-near_first"),
]  # fmt: skip


def small_case() -> None:
    """Every part of the kernel: queries on both sides of a border, rows that differ, groups."""
    setting = coded(({3: 3, 4: 6, 5: 3}, {2: 1, 6: 5, 8: 2}), (2, 3))
    case = CodedCase(setting, (130, 195), 5, (2, 2), 96, mx.float16)
    # One row looks at all its keys alike; scores of the other rise by more than the slack from its
    # first block to its second.
    case.queries = case.queries * mx.array([0.2, 3.0], mx.float16)[:, None, None, None]
    small = (mx.arange(195) < 64) & (mx.arange(2)[:, None] == 1)
    case.keys = mx.where(small[:, None, :, None], case.keys * 0.1, case.keys)
    cache = case.cache()
    mask = cache.make_mask(case.steps)
    mask = mask & ((mx.arange(mask.shape[-1]) + mx.arange(case.steps)[:, None]) % 5 != 2)
    # What was fed and taken back must not be looked at.
    wrong = mx.full((2, 2, 2, 96), mx.nan, mx.float16)
    cache.update(wrong, wrong)
    cache.trim(2)
    decode = codes_kernel.decode

    def tight(queries: Any, rows: Any, blocks: Any, near: Any, values: Any, *rest: Any) -> Any:
        """With arrays that end where what is looked at does."""
        ends = [(start + case.steps - first, n) for start, n, first, _ in rows]
        room, n = (max(x) for x in zip(*ends, strict=True))
        far = [x[:, :, : 64 * n] for x in (values.words, values.scales)]
        values = CodedValues(*far, values.near, values.sinks, values.widths)
        return decode(queries, rows, blocks.first(n), near[:, :, :room], values, *rest)

    with (
        mock.patch.object(far_kernel, "gpu_simdgroups", lambda: 20),
        mock.patch.object(codes_kernel, "decode", tight),
    ):
        output = case.step(cache, mask)
    with seems_to_have(None):
        wanted = case.step(case.cache(), mask)
    np.testing.assert_allclose(output, wanted, atol=2e-2)


COMBINE_MUTATIONS = [
    *(without_barrier(n) for n in (1, 2)),
    Mutation("one split less", "splits; ++s) {\n    const", "splits - 1; ++s) {\n    const"),
    Mutation("no rescaling", "* rescale : 0.0f", ": 0.0f"),
    Mutation("not turned back", "apart < Piece", "apart < 1"),
    Mutation("near ones turned too", "far += s < coded ? output : 0.0f;", "far += output;"),
    Mutation("not normalized", "rsqrt(float(Piece))", "1.0f"),
    Mutation("weights not rescaled", "sums[s * 2 + 1] * rescale", "sums[s * 2 + 1]"),
]  # fmt: skip


def plain_case() -> None:
    """Channels that do not fill the lanes, values as they are; neither mask nor sinks."""
    setting = coded(({4: 10}, {5: 8}), None, sinks=0)
    case = CodedCase(setting, (129,), 2, (4, 2), 80, mx.float16)
    assert_close(case.step(case.cache()), case.expected(), case)


PLAIN_MUTATIONS = [
    Mutation("far blocks seen by all", "block >= least_far ||", "false ||"),
    Mutation(
        "grid past the last channel", "if (d < D) {\n      const float", "{\n      const float"
    ),
    Mutation("queries past the last one", "if (d < D) {\n      const int", "{\n      const int"),
    Mutation(
        "one row's values", "near_values + long(head) * sizes.value_room * D;", "near_values;"
    ),
]


PLANTED = [
    *(("codes_kernel", small_case, mutation) for mutation in MUTATIONS),
    *(("combine_kernel", small_case, mutation) for mutation in COMBINE_MUTATIONS),
    *(("codes_kernel", plain_case, mutation) for mutation in PLAIN_MUTATIONS),
]


@pytest.mark.parametrize(
    ("builder", "case", "mutation"), PLANTED, ids=[str(mutation) for *_, mutation in PLANTED]
)
def test_mutations(bench: MetalBench, builder, case, mutation):
    assert_caught(source_of(builder), mutation, with_kernel(bench, builder, case))
