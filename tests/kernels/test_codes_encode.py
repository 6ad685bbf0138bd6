"""The kernel codes_encode: words and grids are the specification's, bit for bit."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.method import codes as ref
from mlx_delta.ops import codes, codes_encode
from mlx_delta.sensitivities import Sensitivities

from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .code_case import Kinds, coded, fed_batch
from .common import (
    STORED,
    as_float,
    every_run,
    on_bench,
    source_of,
    special_keys,
    walk,
    with_kernel,
)

# Rows of words of two heads: all kinds of rows, and 48 channels each.
KINDS: tuple[Kinds, Kinds] = ({2: 1, 3: 2, 5: 2, 6: 1}, {4: 4, 8: 1})


def check(
    keys: mx.array, kinds: tuple[Kinds, Kinds] | None, size: int = 16, minded: bool = False
) -> None:
    """Code keys of two heads; all is as specified, and as the operations have it.

    Args:
        keys: [B, 2, blocks * size, D].
        kinds: Rows of words of each head; ``None``: keys are turned.
        size: Tokens of a block.
        minded: It is known how much the model minds errors of channels.
    """
    B, _, length, D = keys.shape
    setting = coded(kinds or (), key_bits=3.5)
    coding = codes.Coding.of(setting, 2, D)
    felt = minds(D) if minded else None
    by_place = codes.felt_by_place(felt, coding)
    words, grid = codes_encode.encode(keys, coding, size, by_place)
    assert grid.dtype == keys.dtype and words.shape == (B, length // size, coding.all_rows, size)
    if mx.default_device() == mx.Device(mx.cpu):
        wanted = codes.code_blocks(keys, coding, size, by_place)
        np.testing.assert_array_equal(np.array(words), np.array(wanted[0]))
        np.testing.assert_array_equal(as_float(grid), as_float(wanted[1]))
    for row, head, block in np.ndindex(B, 2, length // size):
        own, kind = as_float(keys[row, head, block * size :][:size]), STORED[keys.dtype]
        own = ref.turn(own, kind) if coding.turned else own
        order, rows = np.array(coding.order[head]), coding.rows[head]
        found = ref.code_block(own, order, rows, kind, of_head(felt, head))
        np.testing.assert_array_equal(as_float(grid[row, head, block]), found.grid)
        stored = words[row, block, slice(*coding.first_rows[head : head + 2])]
        np.testing.assert_array_equal(np.array(stored), found.words)


def minds(D: int, looking: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights and salience of two heads' channels; without ``looking`` all bits are specified."""
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 2, (2, D)).astype(np.float32)
    return weights, (rng.normal(size=(2, D)) * looking).astype(np.float32)


def of_head(felt: tuple[np.ndarray, np.ndarray] | None, head: int) -> np.ndarray | None:
    """What the specification takes for one head."""
    return None if felt is None else np.stack([x[head] for x in felt])


@every_run
def test_codes(bench: MetalBench, options):
    with on_bench(bench, **options):
        check(walk((2, 2, 32, 48), mx.float16), KINDS, minded=True)


def check_salience(keys: mx.array) -> None:
    """With salience, whose `exp` may have another last bit: nearly all is as specified."""
    D = keys.shape[3]
    coding, felt = codes.Coding.of(coded(KINDS, key_bits=3.5), 2, D), minds(D, looking=0.5)
    _, grid = codes_encode.encode(keys, coding, 16, codes.felt_by_place(felt, coding))
    differing = []
    for row, head, block in np.ndindex(keys.shape[0], 2, keys.shape[2] // 16):
        own, order = as_float(keys[row, head, block * 16 :][:16]), np.array(coding.order[head])
        mind = of_head(felt, head)
        wanted = ref.code_block(own, order, coding.rows[head], STORED[keys.dtype], mind)
        differing.append(as_float(grid[row, head, block]) != wanted.grid)
    assert np.mean(differing) < 0.01


def test_tokens_that_are_looked_at_count_more(bench: MetalBench):
    with on_bench(bench):
        check_salience(walk((2, 2, 32, 48), mx.float16))


@every_run
def test_turned_keys(bench: MetalBench, options):
    with on_bench(bench, **options):
        check(walk((2, 2, 16, 96), mx.bfloat16), None)


@pytest.mark.parametrize(
    ("head_dim", "size", "dtype", "kinds"),
    [
        (64, 64, mx.float16, ({2: 2, 3: 2, 4: 2, 6: 1, 8: 1}, {4: 8})),
        (80, 8, mx.bfloat16, ({4: 10}, {8: 5})),
        (96, 24, mx.float16, ({4: 12}, {6: 8})),
        (128, 64, mx.bfloat16, ({2: 2, 3: 4, 4: 5, 5: 4, 8: 1}, {4: 16})),
        (256, 64, mx.float16, None),
        (256, 64, mx.bfloat16, ({4: 32}, {2: 20, 8: 11})),
    ],
)
def test_shapes(bench: MetalBench, request, head_dim, size, dtype, kinds):
    if kinds and not request.config.getoption("--all"):
        pytest.skip("each shape is compiled anew; --all takes all")
    with on_bench(bench):
        check(walk((1, 2, 2 * size, head_dim), dtype), kinds, size, minded=head_dim == 80)


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("kind", ["constant", "alternating", "extreme", "nan", "inf"])
def test_special_keys(bench: MetalBench, kind, turned):
    with on_bench(bench):
        if turned:
            check(special_keys(kind, (1, 2, 32, 96), mx.bfloat16), None)
        else:
            check(special_keys(kind, (1, 2, 32, 48), mx.float16), KINDS, minded=True)


def test_a_cache_encodes_with_it_whatever_its_rows_are_at(bench: MetalBench):
    """Rows of several lengths, fed token by token: the store has what operations put there."""
    setting = dataclasses.replace(
        coded(KINDS, None, block_size=16, window=16, sinks=2),
        sensitivities=Sensitivities([np.random.default_rng(1).lognormal(0, 1, (2, 48)) / 48]),
    )

    def stored() -> list[np.ndarray]:
        cache = fed_batch(setting, 48)
        arrays = [x for x in cache.state if isinstance(x, mx.array)]
        return [np.array(x) for x in arrays if x.dtype == mx.uint32]

    wanted = stored()
    assert len(wanted) == 1 and wanted[0].all(axis=2).any()
    with on_bench(bench):
        np.testing.assert_array_equal(stored()[0], wanted[0])


MUTATIONS = [
    without_barrier(1),
    without_barrier(2),
    without_barrier(3),
    without_barrier(4),
    Mutation("a step is rounded down", "float(nearest) < exact", "false"),
    Mutation("a NaN has a grid", "abs(value) < INFINITY", "true"),
    Mutation("codes are cut off", "/ step + 0.5f", "/ step"),
    Mutation("as the grid has them, not as felt", "if (Felt) {\n        s", "if (0) {\n        s"),
    Mutation("all channels are felt alike", "(apart, apart), felt[i])", "(apart, apart), 1.0f)"),
    Mutation("a token may count for nothing", "mean, 1.0f / 8.0f, 8.0f)", "mean, 0.0f, 8.0f)"),
    Mutation("a token may count for all", "1.0f / 8.0f, 8.0f)", "1.0f / 8.0f, 64.0f)"),
    Mutation("tokens are looked at alike", "look += exact_product(apart, felt[D + i]);", ""),
    Mutation("looked at by weights", "felt[D + i]", "felt[i]"),
    Mutation("shares do not add up to 1", "shares[t] = tokens[t] / sum;", "shares[t] = tokens[t];"),
    Mutation("codes and values apart from zero", "own - line.value", "own"),
    Mutation("fitted once", "fit < 2", "fit < 1"),
    Mutation("low without the codes' mean", "- exact_product(fitted, line.code)", ""),
    Mutation("another head's channels", "places + own * D", "places"),
    Mutation("another head's feelings", "felt + (Felt ? own * 2 * D : 0)", "felt"),
    Mutation("another head's rows", "rows + first,", "rows,"),
    Mutation("another row's words", "long(head / Heads) * n_blocks", "0"),
]  # fmt: skip


TURN_MUTATIONS = [
    Mutation("rounded beyond the range", "value > most ? most : value", "value"),
    Mutation(
        "tokens behind the 32nd",
        "int t = int(lane); t < Size; t += 32) {\n      sum += s",
        "int t = int(lane); t < 32 && t < Size; t += 32) {\n      sum += s",
    ),
    without_barrier(1, "threadgroup_barrier(mem_flags::mem_device);"),
    Mutation("sums only", "int(lane) & apart ? other - x[k] :", ""),
    Mutation("32 channels are turned at most", "32 * apart < Piece", "false"),
    Mutation("pieces of 32", "apart < Piece && apart < 32", "apart < 32"),
    Mutation("turned keys grow", "to_stored<S>(x[k] * factor)", "to_stored<S>(x[k])"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    def cases() -> None:
        keys = walk((2, 2, 32, 48), mx.float16)
        keys[:, :, 3] *= 30  # one token counts most, and its neighbours least
        check(keys, KINDS, minded=True)
        check(special_keys("nan", (1, 2, 16, 48), mx.float16), KINDS, minded=True)
        if "looked" in mutation.name:
            check_salience(keys)
        if "step" in mutation.name or "alike" in mutation.name:
            check(keys, KINDS)

    run = with_kernel(bench, "codes_encode_kernel", cases)
    assert_caught(source_of("codes_encode_kernel"), mutation, run)


@pytest.mark.parametrize("mutation", TURN_MUTATIONS, ids=str)
def test_mutations_of_turning(bench: MetalBench, mutation):
    def cases() -> None:
        keys = walk((1, 2, 40, 64), mx.float16)
        keys[:, :, 3] *= 30
        check(keys, None, size=40)
        check(special_keys("extreme", (1, 2, 40, 64), mx.float16), None, size=40)
        if mutation.name == "pieces of 32":
            check(walk((1, 2, 16, 48), mx.float16), None)

    run = with_kernel(bench, "codes_encode_kernel", cases)
    assert_caught(source_of("codes_encode_kernel"), mutation, run)


def test_what_it_does_not_take(bench: MetalBench):
    coding = codes.Coding.of(coded(KINDS), 2, 48)
    keys = mx.zeros((1, 2, 48, 48), mx.float16)
    for wrong, felt, message in (
        (keys[:, :, :40], None, "whole blocks of 16 tokens"),
        (keys.astype(mx.float32), None, "float16 or bfloat16 keys"),
        (keys[:, :1], None, "not of 1 kv heads of 48 channels"),
        (keys, mx.ones((2, 48)), r"felt must have shape \[2, 2, 48\]"),
    ):
        with pytest.raises(ValueError, match=message):
            codes_encode.encode(wrong, coding, 16, felt)
