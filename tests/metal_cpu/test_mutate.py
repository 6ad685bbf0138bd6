"""Mutations: they apply or fail loudly, and the checks of a good test notice them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from .bench import KernelSource, MetalBench
from .mutate import Mutation, assert_caught, without_barrier
from .test_kernel_groups import ROW_SUM, run_row_sum


def test_replaces_one_occurrence_or_all() -> None:
    assert Mutation("m", "a", "b", 2)("a a a") == "a b a"
    assert Mutation("m", "a", "b", 0)("a a a") == "b b b"


@pytest.mark.parametrize("occurrence", [0, 1, 2])
def test_text_that_is_gone_is_an_error(occurrence: int) -> None:
    with pytest.raises(ValueError, match="occurs 0 times"):
        Mutation("m", "gone", "b", occurrence)("a a a")


def test_edits_header_and_body() -> None:
    kernel = KernelSource("k", ["x"], ["out"], "body(1);", header="void body(int);\n")
    edited = kernel.edited(Mutation("m", "body(", "other(", 0))
    assert (edited.header, edited.source) == ("void other(int);\n", "other(1);")
    assert kernel.edited(str) == kernel


MUTATIONS = [
    without_barrier(1),
    Mutation("barrier-too-weak", "threadgroup_barrier", "simdgroup_barrier"),
    Mutation("no-lane-writes", "if (lane == 0) partial", "if (lane == 32) partial"),
    Mutation("all-lanes-write", "if (lane == 0) partial[simdgroup]", "partial[simdgroup]"),
    Mutation("bound-too-large", "i < N;", "i <= N;"),
    Mutation("bound-too-small", "i < N;", "i + 1 < N;"),
    Mutation("forgets-the-row", "x[row * N + i]", "x[i]"),
    Mutation("no-simd-sum", "sum = simd_sum(sum);", ""),
    Mutation(
        "barrier-in-a-branch", "threadgroup_barrier", "if (simdgroup < 3) threadgroup_barrier"
    ),
    Mutation("array-too-small", "partial[32]", "partial[3]"),
    Mutation("reads-all-partials", "lane < simdgroups_per_threadgroup", "lane < 32"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(bench: MetalBench, mutation: Mutation) -> None:
    assert_caught(ROW_SUM, mutation, lambda kernel: run_row_sum(bench, kernel, mode="checked"))


def test_harmless_mutation_survives(bench: MetalBench) -> None:
    harmless = Mutation("harmless", "float sum = 0;", "float sum = 0.0f;")
    with pytest.raises(pytest.fail.Exception, match="'harmless' survived"):
        assert_caught(ROW_SUM, harmless, lambda kernel: run_row_sum(bench, kernel))


def test_reads_the_source_from_a_builder() -> None:
    def build_kernel() -> object:
        return mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["out"], source="s")

    assert KernelSource.of(build_kernel) == KernelSource("k", ["x"], ["out"], "s")
    with pytest.raises(TypeError, match="not a kernel"):
        KernelSource.of(lambda: 3)
