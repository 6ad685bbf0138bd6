"""The kernel delta_runs on the bench: its runs cost no more than the specification's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import runs
from mlx_delta.ops import hold_kernel, runs_kernel

from ..metal_cpu import KernelSource, MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import as_float, every_run, source_of, special_keys, walk, with_kernel

LEVEL = 0.3


def check_runs(keys: np.ndarray, optimal: bool, sinks: np.ndarray, level: float = LEVEL) -> None:
    """Cut blocks [M, n, D] on the bench; runs, means and exact tokens are as specified."""
    M, _, D = keys.shape
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1, (M, D)).astype(np.float32)
    along = rng.normal(0, 0.3, (M, D)).astype(np.float32)
    felt = zip(keys, weights, along, strict=True)
    tokens = np.stack([runs.token_weights(*own) for own in felt])
    costs = np.stack([runs.run_costs(w, level) for w in weights])
    means, starts = runs_kernel.cut_runs(
        mx.array(keys), mx.array(tokens), mx.array(costs), sinks, optimal
    )
    for m in range(M):
        cut = runs.optimal_starts if optimal else runs.greedy_starts
        wanted = runs.cut_sinks(cut(keys[m], weights[m], tokens[m], level), int(sinks[m]))
        got = np.array(starts[m])
        finite = np.isfinite(keys[m]).all(axis=0)
        np.testing.assert_array_equal(got[:, ~finite], wanted[:, ~finite])
        # Products may be fused, which moves a value across its threshold now and then.
        assert (got[:, finite] == wanted[:, finite]).mean() > (0.97 if optimal else 0.995)
        costs_of = [
            runs.runs_cost(keys[m][:, finite], x[:, finite], weights[m][finite], tokens[m], level)
            for x in (got, wanted)
        ]
        if optimal:
            np.testing.assert_allclose(costs_of[0], costs_of[1], rtol=1e-4, atol=1e-4)
        held = runs.weighted_means(keys[m], got, tokens[m])
        np.testing.assert_allclose(np.array(means[m]), held, rtol=1e-5, atol=1e-5)
        single = got & np.concatenate([got[1:], np.ones((1, D), bool)])
        np.testing.assert_array_equal(np.array(means[m])[single], keys[m][single])


def runs_keys(shape: tuple[int, ...], kind: str = "") -> np.ndarray:
    keys = special_keys(kind, shape, mx.float16) if kind else walk(shape, mx.float16)
    return as_float(keys)


def _on_bench(bench: MetalBench, **options: Any) -> Any:
    if bench.on_gpu and options.get("mode") == "checked":
        pytest.skip("the GPU does not tell; this runs on Linux")
    kernel = KernelSource.of(runs_kernel.runs_kernel.__wrapped__)
    bound = bench.bind(kernel, **options)
    return mock.patch.object(runs_kernel, "runs_kernel", lambda: bound)


@every_run
@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "greedy"])
def test_runs(bench: MetalBench, optimal, options):
    with _on_bench(bench, **options):
        check_runs(runs_keys((2, 16, 40)), optimal, np.array([3, 0]))


@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "greedy"])
@pytest.mark.parametrize(("size", "head_dim"), [(8, 16), (64, 64), (64, 128), (32, 256), (16, 80)])
def test_shapes(bench: MetalBench, optimal, size, head_dim):
    with _on_bench(bench, mode="fast"):
        check_runs(runs_keys((2, size, head_dim)), optimal, np.array([size, 0]))


@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "greedy"])
@pytest.mark.parametrize("kind", ["constant", "alternating", "nan", "inf"])
def test_special_keys(bench: MetalBench, optimal, kind):
    with _on_bench(bench, mode="fast"):
        check_runs(runs_keys((1, 16, 32), kind), optimal, np.array([0]))


MUTATIONS = [
    without_barrier(1),
    Mutation("lanes without a channel", "? int(word * 32 + lane) : D - 1", "? 0 : D"),
    Mutation("another block's costs", "costs + block * D", "costs"),
    Mutation("another block's tokens", "tokens + block * Size", "tokens"),
    Mutation("another block's sinks", "sinks[block]", "sinks[0]"),
    Mutation("runs are free", "least + cost", "least"),
    Mutation("an infinity is averaged", "finite = finite && abs(key) < INFINITY;", ""),
    Mutation("a run's tokens count alike", "exact_product(tokens[t], keys", "(keys"),
    Mutation("no division by the weight", "/ (total[t] - total[s])", ""),
    Mutation("runs from the start only", "s < t; ++s", "s < 1; ++s"),
    Mutation("the last cut only", "t > 0; t = int(begins[t * 32 + lane])", "t > 0; t = 0"),
    Mutation("sinks are averaged", "if (sinks > 0) {", "if (false) {"),
    Mutation("one sink too few", "(1ul << (sinks + 1)) - 1ul", "(1ul << sinks) - 1ul"),
    Mutation(
        "a NaN is held",
        "keep = abs(key - (first + sum / weight)) <= threshold",
        "keep = !(abs(key - (first + sum / weight)) > threshold)",
    ),
    Mutation(
        "compared with the first", "(first + sum / weight)) <= threshold", "first) <= threshold"
    ),
    Mutation("thresholds without tokens", "base / sqrt(sqrt(tokens[t]))", "base"),
    Mutation("the weight goes on", "(keep ? weight : 0.0f)", "weight"),
    Mutation("means without weights", "exact_product(tokens[end], keys", "(keys"),
    Mutation("a run past the block's end", "end < Size && !", "!"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    def cases() -> None:
        for optimal in (True, False):
            check_runs(runs_keys((2, 16, 40)), optimal, np.array([3, 0]))
        check_runs(runs_keys((1, 32, 32)), False, np.array([0]), level=3.0)
        check_runs(runs_keys((1, 16, 32), "inf"), True, np.array([0]))
        check_runs(runs_keys((1, 16, 32), "nan"), False, np.array([0]))

    assert_caught(source_of("runs_kernel"), mutation, with_kernel(bench, "runs_kernel", cases))


@pytest.mark.parametrize(
    "builder", [hold_kernel.hold_kernel, runs_kernel.runs_kernel], ids=["hold", "runs"]
)
def test_what_compares_with_a_threshold_asks_for_no_fast_math(builder):
    kernel = KernelSource.of(builder.__wrapped__)
    assert kernel.compile_options == {"math_mode": "safe"}
    kernel.build()  # MLX knows the name, and refuses others
    with pytest.raises(ValueError, match="math_mode"):
        replace(kernel, compile_options={"math_mode": "exact"}).build()
