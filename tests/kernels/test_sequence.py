"""The kernel token_sequence: its sequences are the specification's, and keys lie in them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method import runs
from mlx_delta.method.sequence import token_sequence
from mlx_delta.ops import sequence_kernel
from mlx_delta.ops.runs import hold_runs
from mlx_delta.sensitivities import Sensitivities

from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
from .common import as_float, every_run, on_bench, source_of, special_keys, walk, with_kernel

LEVEL = 0.3


def weights_of(heads: int, head_dim: int) -> np.ndarray:
    """What channels weigh, [heads, head_dim], by which some count ten times as much as others."""
    rng = np.random.default_rng(0)
    return rng.lognormal(0, 2, (heads, head_dim)).astype(np.float32)


def setting_of(heads: int, head_dim: int, size: int, sinks: int) -> DeltaConfig:
    """Of one layer."""
    return DeltaConfig(
        **{"threshold_mode": "greedy", "level": LEVEL, "block_size": size, "window": size},
        sinks=sinks,
        sensitivities=Sensitivities([weights_of(heads, head_dim)]),
    ).for_layer(0, 1)


def check(keys: mx.array, size: int = 16, sinks: int = 0, first_block: int = 0) -> np.ndarray:
    """Put keys [B, H, blocks * size, D] in sequence; all is as specified, bit for bit.

    Returns:
        The sequences, [B, H, blocks, size].
    """
    B, H, length, D = keys.shape
    setting, weights = setting_of(H, D, size, sinks), weights_of(H, D)
    sequence, ordered = sequence_kernel.order_tokens(keys, setting, first_block)
    assert ordered.dtype == keys.dtype
    found, placed, text = np.array(sequence), as_float(ordered), as_float(keys)
    for row, head, block in np.ndindex(B, H, length // size):
        span = slice(block * size, (block + 1) * size)
        own = text[row, head, span]
        wanted = token_sequence(own, weights[head], sinks - (first_block + block) * size)
        np.testing.assert_array_equal(found[row, head, block], wanted)
        np.testing.assert_array_equal(placed[row, head, span], own[wanted])
    return found


def is_moved(sequences: np.ndarray) -> np.ndarray:
    """Of which blocks tokens are not as they come."""
    return (sequences != np.arange(sequences.shape[3])).any(axis=3)


def mixed(keys: mx.array) -> mx.array:
    """The same tokens [.., N, D] in a random order, and one number that makes all codes coarse."""
    tokens = np.random.default_rng(3).permutation(keys.shape[-2])
    keys = keys[..., mx.array(tokens), :]
    keys[..., ::8, 3] *= 16
    return keys


def repeated(shape: tuple[int, ...], dtype: mx.Dtype = mx.float16) -> mx.array:
    """Keys [.., N, D] of which many are the same, and others as far from each other."""
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 2, (*shape[:-1], 2)) * 2.0 - 1
    keys = np.zeros(shape)
    keys[..., 0], keys[..., 7] = corners[..., 0], corners[..., 1]
    return mx.array(keys.astype(np.float32)).astype(dtype)


@every_run
def test_sequences(bench: MetalBench, options):
    with on_bench(bench, **options):
        assert is_moved(check(mixed(walk((2, 2, 32, 40), mx.float16)))).all()
        check(repeated((1, 2, 16, 40)))


@pytest.mark.parametrize(
    ("size", "head_dim", "dtype"),
    [
        (64, 64, mx.bfloat16),
        (8, 16, mx.float32),
        (24, 80, mx.float32),
        (40, 40, mx.float16),
        (64, 256, mx.float16),
    ],
)
def test_shapes(bench: MetalBench, request, size, head_dim, dtype):
    if size != 64 and not request.config.getoption("--all"):
        pytest.skip("each shape is compiled anew; --all takes all")
    with on_bench(bench):
        assert is_moved(check(mixed(walk((1, 2, 2 * size, head_dim), dtype)), size)).all()


@pytest.mark.parametrize(("sinks", "first_block", "stay"), [(3, 0, 1), (17, 0, 2), (35, 1, 2)])
def test_blocks_with_sinks_stay_as_they_are(bench: MetalBench, sinks, first_block, stay):
    with on_bench(bench):
        moved = is_moved(check(mixed(walk((1, 2, 48, 40), mx.float16)), 16, sinks, first_block))
    assert not moved[:, :, :stay].any() and moved[:, :, stay:].all()


@pytest.mark.parametrize(
    ("kind", "moves"),
    [
        *(("constant", False), ("nan", False), ("inf", False), ("too large", False)),
        *(("hardly apart", False), ("alternating", True), ("steps", True), ("extreme", True)),
    ],
)
def test_special_keys(bench: MetalBench, kind, moves):
    if kind in ("too large", "hardly apart"):
        keys = walk((1, 2, 16, 40), mx.float32) * (3e37 if kind == "too large" else 1e-34)
    else:
        keys = special_keys(kind, (1, 2, 16, 40), mx.float16)
    with on_bench(bench):
        assert (is_moved(check(mixed(keys) if kind != "constant" else keys)) == moves).all()


def test_runs_go_along_it(bench: MetalBench):
    """Both kernels, one behind the other, hold keys as the specification does."""
    keys = mixed(walk((1, 2, 48, 40), mx.float16))
    setting, weights = setting_of(2, 40, 16, 3), weights_of(2, 40)
    with on_bench(bench):
        means, starts, zeros = hold_runs(keys.reshape(1, 2, 3, 16, 40), setting, 0)
    for head, block in np.ndindex(2, 3):
        own = as_float(keys[0, head, block * 16 :][:16])
        flat = np.zeros(40, np.float32)
        held, wanted = runs.block_runs(own, weights[head], flat, LEVEL, False, 3 - 16 * block)
        np.testing.assert_array_equal(np.array(starts[0, head, block]), wanted)
        np.testing.assert_array_equal(np.array(means[0, head, block]), held)
        assert zeros[0, head, block].item() == (~wanted).sum()


APART = "exact_product(value_at(own, t) - means[k], factors[d])"
NUMBER = "distance << 6 | uint(token));\n      }\n    }\n    last = int(simd_min(nearest) & 63u);"
LATER = NUMBER.replace("uint(token)", "(uint(token) ^ 63u)").replace("& 63u", "& 63u ^ 63u")
MUTATIONS = [
    without_barrier(1),
    Mutation("ties to the later token", NUMBER, LATER),
    Mutation("another head's factors", "head % Heads * D", "0"),
    Mutation("sinks are moved", "as_is || ", ""),
    Mutation("sinks of another block", "(place[0] + block) * Size", "block * Size"),
    Mutation("sinks of the first block", "(place[0] + block) * Size", "place[0] * Size"),
    Mutation("a NaN is put in sequence", "apart < INFINITY", "!(apart >= INFINITY)"),
    Mutation("a NaN of one lane", "simd_any(!finite)", "!finite"),
    Mutation("what hardly differs", "|| !(largest > LEAST_APART)", ""),
    Mutation("not apart from the mean", "value_at(own, t) - means[k]", "value_at(own, t)", 0),
    Mutation("the mean of other channels", "(d < D ? d : 0), 0};\n    means[k]",
             "0, 0};\n    means[k]"),
    Mutation("the largest of a lane", "largest = simd_max(largest);", ""),
    Mutation("the range without factors", APART, "value_at(own, t) - means[k]", 1),
    Mutation("codes without factors", APART, "value_at(own, t) - means[k]", 2),
    Mutation("other codes", "float(Most) / largest", "float(Most - 1) / largest"),
    Mutation("codes are cut off", "rint(exact_product(apart, scale))",
             "exact_product(apart, scale)"),
    Mutation("codes are not signed", "uint(apart * apart)", "uint(abs(apart))"),
    Mutation("another pitch", "codes[last * Pitch + d]", "codes[last * D + d]"),
    Mutation("the first channels", "for (int d = 0; d < D; ++d)", "for (int d = 0; d < 32; ++d)"),
    Mutation("channels behind the last", "t < Size && d < D; ++t", "t < Size; ++t", 0),
    Mutation("lanes without a channel", "(d < D ? d : 0)", "d"),
    Mutation("tokens from the 32nd on", "int Own = (Size + 31) / 32", "int Own = 1"),
    Mutation("tokens behind the last", " || token >= Size", ""),
    Mutation("a token twice", "gone[i] = gone[i] || token", "gone[i] = token"),
    Mutation("the same token again", "token == last || ", ""),
    Mutation("keys as they come", "= keys[token * D + d]", "= keys[place * D + d]"),
    Mutation("32 channels of a key", "d < D; d += 32) {\n    ordered",
             "d < 32; d += 32) {\n    ordered"),
    Mutation("one block's sequence", "sequence + at * Size", "sequence + block * Size"),
    Mutation("one block's keys", "ordered + at * Size * D", "ordered + block * Size * D"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    def cases() -> None:
        if mutation.name == "tokens from the 32nd on":
            check(mixed(walk((1, 1, 40, 40), mx.float16)), 40)
            return
        if mutation.name == "what hardly differs":
            check(mixed(walk((1, 1, 16, 40), mx.float32) * 1e-34))
            return
        check(mixed(walk((2, 2, 32, 40), mx.float16)), 16, 3)
        check(mixed(walk((1, 2, 48, 40), mx.float16)), 16, 35, 1)
        check(repeated((1, 2, 16, 40)))
        check(mixed(special_keys("nan", (1, 2, 16, 40), mx.float16)))

    run = with_kernel(bench, "sequence_kernel", cases)
    assert_caught(source_of("sequence_kernel"), mutation, run)


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 2, 20, 40), 16), ((1, 2, 0, 40), 16), ((1, 2, 16, 264), 16)]
)
def test_what_it_does_not_take(bench: MetalBench, shape, size):
    setting = setting_of(2, shape[3], size, 0)
    with on_bench(bench), pytest.raises(ValueError, match=r"^\[token_sequence\] takes keys of"):
        sequence_kernel.order_tokens(mx.zeros(shape, mx.float16), setting, 0)
