"""The kernel delta_runs on the bench: its runs and means are the specification's."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method import runs
from mlx_delta.ops import (
    codes_encode,
    deltas_encode,
    hold_kernel,
    runs_kernel,
    sequence_kernel,
    values_encode,
)
from mlx_delta.sensitivities import Sensitivities

from ..metal_cpu import KernelSource, MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import (
    as_float,
    every_run,
    on_bench,
    source_of,
    special_keys,
    walk,
    with_kernel,
)

LEVEL = 0.3


def check_runs(
    keys: mx.array,
    optimal: bool,
    size: int = 16,
    sinks: int = 3,
    level: float = LEVEL,
    looking: float = 0.0,
    alike: bool = False,
) -> None:
    """Cut keys [B, H, blocks * size, D] on the bench; runs and means are as specified.

    Tokens stay as they come: the kernel knows of no sequence. To the last bit, but for the powers
    that say which tokens are looked at: those of another back end may have another last bit, which
    moves a value across its threshold now and then.
    """
    B, H, length, D = keys.shape
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1, (H, D)).astype(np.float32)
    salience = (rng.normal(size=(H, D)) * looking).astype(np.float32)
    setting = DeltaConfig(
        threshold_mode="optimal" if optimal else "greedy",
        level=level,
        block_size=size,
        window=size,
        sinks=sinks,
        sensitivities=Sensitivities([weights], salience=[salience]),
    ).for_layer(0, 1)
    words, means, counts = runs_kernel.cut_runs(keys, setting, 0, alike)
    starts = np.array(runs_kernel.elements(words, D))
    equal = []
    for row, head, block in np.ndindex(B, H, length // size):
        own = as_float(keys[row, head, block * size :][:size])
        alone = min(max(sinks - block * size, 0), size)
        if alike:
            own[:alone] = own[min(alone, size - 1)]
        felt = weights[head], salience[head]
        with np.errstate(all="ignore"):
            tokens = runs.token_weights(own, *felt)
            cut = runs.optimal_starts if optimal else runs.greedy_starts
            wanted = cut(own, weights[head], tokens, level)
            wanted = runs.cut_sinks(wanted, 0 if alike else alone)
            held = runs.held_values(own, wanted, tokens)
        np.testing.assert_allclose(np.array(counts[row, head, block]), tokens, rtol=1e-5)
        got, found = starts[row, head, block], np.array(means[row, head, block])
        finite = np.isfinite(own).all(axis=0)
        np.testing.assert_array_equal(got[:, ~finite], wanted[:, ~finite])
        equal.append((got == wanted).mean())
        if not looking:
            np.testing.assert_array_equal(got, wanted)
            np.testing.assert_array_equal(found, held)
            continue
        if optimal:
            costs = [runs.runs_cost(own, x, weights[head], tokens, level) for x in (got, wanted)]
            np.testing.assert_allclose(costs[0], costs[1], rtol=1e-4, atol=1e-4)
        held = runs.held_values(own, got, tokens)
        np.testing.assert_allclose(found, held, rtol=1e-5, atol=1e-5)
    assert min(equal) > 0.97


@every_run
@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "greedy"])
def test_runs(bench: MetalBench, optimal, options):
    with on_bench(bench, **options):
        check_runs(walk((2, 2, 32, 40), mx.float16), optimal)
        check_runs(walk((1, 2, 32, 40), mx.float16), optimal, looking=0.3)


@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "greedy"])
@pytest.mark.parametrize(
    ("size", "head_dim", "dtype"),
    [(8, 16, mx.float32), (64, 64, mx.bfloat16), (32, 256, mx.float16), (24, 80, mx.float32)],
)
def test_shapes(bench: MetalBench, optimal, size, head_dim, dtype):
    with on_bench(bench):
        check_runs(walk((1, 2, 2 * size, head_dim), dtype), optimal, size, sinks=size)


@pytest.mark.parametrize("sinks", [3, 16, 21])
def test_sinks_that_are_as_the_token_after_them(bench: MetalBench, sinks):
    with on_bench(bench):
        check_runs(walk((1, 2, 48, 40), mx.float16), True, sinks=sinks, alike=True)


@pytest.mark.parametrize("optimal", [True, False], ids=["optimal", "greedy"])
@pytest.mark.parametrize("kind", ["constant", "alternating", "nan", "inf"])
def test_special_keys(bench: MetalBench, optimal, kind):
    with on_bench(bench):
        check_runs(special_keys(kind, (1, 2, 16, 40), mx.float16), optimal, sinks=0)


MUTATIONS = [
    without_barrier(1),
    without_barrier(2),
    without_barrier(3),
    Mutation("lanes without a channel", "? int(word * 32 + lane) : D - 1", "? 0 : D"),
    Mutation("another head's weights", "own, own + Heads", "felt, own + Heads"),
    Mutation("another head's costs", "own + 2 * Heads * D", "felt + 2 * Heads * D"),
    Mutation("no head's salience", "own + Heads * D, own", "own, own"),
    Mutation("another block's sinks", "(place[0] + block) * Size", "0"),
    Mutation("keys are not weighed", "exact_product(exact_product(apart, apart), weights[d])",
             "exact_product(apart, apart)"),
    Mutation("not apart from the mean", "value_at(own, t) - means[k]", "value_at(own, t)"),
    Mutation("tokens of any weight", "clamp(tokens[t] / mean, 1.0f / 8.0f, 8.0f)",
             "tokens[t] / mean"),
    Mutation("a NaN weighs", "usable = !simd_any(!usable);", ""),
    Mutation("tokens behind the 32nd", "int t = int(lane); t < Size; t += 32) {\n    tokens[t] =",
             "int t = int(lane); t < min(Size, 32); t += 32) {\n    tokens[t] ="),
    Mutation("runs are free", "least + cost", "least"),
    Mutation("an infinity is averaged", "finite = finite && abs(key) < INFINITY;", ""),
    Mutation("a run's tokens count alike", "exact_product(tokens[t], value_at(keys, t) - mean)",
             "value_at(keys, t) - mean"),
    Mutation("no division by the weight", "1.0f / (total[t] - total[s])", "1.0f"),
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
    Mutation("means without weights", "exact_product(tokens[t], value_at(keys, t) - first)",
             "value_at(keys, t) - first"),
    Mutation("means as they are", "ratio > 1.0f && factor > 1.0f", "false"),
    Mutation("one key is stretched", "if (stretched && !alone) {", "if (stretched) {"),
    Mutation("the last run of one key", "t + 1 == Size || ", ""),
    Mutation("stretched as far as it goes", "ratio - 1.0f), MOST_STRETCH)", "ratio - 1.0f), 9.0f)"),
    Mutation("stretched all the way", "exact_product(STRETCH, ratio - 1.0f)", "(ratio - 1.0f)"),
    Mutation("stretched from zero", "center + exact_product(mean - center, factor)",
             "exact_product(mean, factor)"),
    Mutation("variances of tokens alike", "exact_product(tokens[t], square)", "square"),
    Mutation("a run past the block's end", "for (++t; t < Size && !",
             "for (++t; !"),
    Mutation("first tokens as they are", "Alike ? min(sinks, Size - 1) : 0", "0"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    keys = walk((2, 2, 32, 40), mx.float16)
    keys[:, :, 7] *= 30  # a token that counts most

    def cases() -> None:
        if mutation.name == "tokens behind the 32nd":
            check_runs(walk((1, 2, 40, 40), mx.float16), True, size=40)
            return
        if mutation.name == "a NaN weighs":
            large = walk((1, 2, 16, 40), mx.float32)
            large[:, :, 5] = 1e19  # whose square is none, where those of others are some
            check_runs(large, False, sinks=0)
            return
        for optimal in (False, True):
            check_runs(keys, optimal)
        check_runs(walk((1, 2, 32, 40), mx.float16), False, level=3.0)
        check_runs(special_keys("inf", (1, 2, 16, 40), mx.float16), True, sinks=0)
        check_runs(special_keys("nan", (1, 2, 16, 40), mx.float16), False, sinks=0)
        check_runs(keys, True, looking=0.3)
        check_runs(keys, True, alike=True)

    run = with_kernel(bench, "runs_kernel", cases)
    assert_caught(source_of("runs_kernel"), mutation, run)


@pytest.mark.parametrize(
    "builder",
    [
        hold_kernel.hold_kernel,
        runs_kernel.runs_kernel,
        sequence_kernel.sequence_kernel,
        codes_encode.codes_encode_kernel,
        deltas_encode.deltas_encode_kernel,
        values_encode.values_encode_kernel,
    ],
    ids=["hold", "runs", "sequence", "codes", "deltas", "values"],
)
def test_what_compares_with_a_threshold_asks_for_no_fast_math(builder):
    kernel = KernelSource.of(builder.__wrapped__)
    assert kernel.compile_options == {"math_mode": "safe"}
    kernel.build()  # MLX knows the name, and refuses others
    with pytest.raises(ValueError, match="math_mode"):
        replace(kernel, compile_options={"math_mode": "exact"}).build()
