"""The kernel deltas_encode: what it stores is the specification's, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import BatchDeltaKVCache, DeltaConfig
from mlx_delta.method import deltas as ref
from mlx_delta.ops import deltas, deltas_encode
from mlx_delta.sensitivities import Sensitivities

from ..attention.test_hybrid import attend
from ..metal_cpu import MetalBench
from ..metal_cpu.mutate import Mutation, assert_caught, without_barrier
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
from .delta_case import lanes

WIDTHS = (6, 5, 4, 3, 2, 2)  # of lanes: 48 channels
OTHERS = (7, 7, 4, 4, 3, 2)


def setting_of(
    widths: tuple[int, ...] = WIDTHS,
    others: tuple[int, ...] | None = OTHERS,
    size: int = 16,
    sinks: int = 3,
    optimal: bool = False,
    level: float = 0.1,
) -> DeltaConfig:
    """Of one layer and two heads; keys are looked at alike, so that runs are the same bits too."""
    D = 8 * len(widths)
    weights = np.random.default_rng(0).lognormal(0, 1, (2, D)).astype(np.float32) / D
    return lanes(
        *(widths, None, others),
        **{"block_size": size, "window": size, "sinks": sinks, "level": level},
        threshold_mode="optimal" if optimal else "greedy",
        sensitivities=Sensitivities([weights]),
    )


def check(keys: mx.array, setting: DeltaConfig, first_block: int = 0) -> deltas.StoredDeltas:
    """Store keys [B, 2, blocks * size, D]; all is as specified, and as the operations have it."""
    B, H, length, D = keys.shape
    size, coding = setting.block_size, deltas.LaneCoding.of(setting, H, D)
    stored = deltas_encode.encode(keys, setting, coding, first_block)
    weights, salience = setting.sensitivities_of_layer(H, D)
    counts = np.array(stored.counts)
    for row, head, block in np.ndindex(B, H, length // size):
        widths = np.array(list(map(int, setting.key_widths[0][head])))
        sinks = min(max(0, setting.sinks - (first_block + block) * size), size)
        wanted = ref.pack_block(
            as_float(keys[row, head, block * size :][:size]),
            *(weights[head], salience[head], setting.run_level),
            *(setting.threshold_mode == "optimal", sinks, widths, STORED[keys.dtype]),
        )
        at = row, head, block
        words = np.array(stored.words[at])
        np.testing.assert_array_equal(np.array(stored.sequence[at]), wanted.sequence)
        np.testing.assert_array_equal(np.array(stored.steps[at]), wanted.steps)
        np.testing.assert_array_equal(as_float(stored.low[at]), wanted.low)
        assert counts[at] == len(wanted.words)
        np.testing.assert_array_equal(words[: counts[at]], wanted.words)
        assert not words[counts[at] :].any()
        lanes, held = D // ref.LANE, int(words[0]).bit_count()
        masks = words[1 : 1 + held * size // 4]
        begun = np.bitwise_count(masks).sum() + (lanes - held) * ref.LANE * size
        assert stored.zeros[at].item() == size * D - begun
    return stored


def mixed_keys(setting: DeltaConfig, length: int, dtype: mx.Dtype = mx.float16) -> mx.array:
    """Keys [2, 2, length, D] of which every other width's channels change with every token."""
    widths = np.array([[int(width) for width in head] for head in setting.key_widths[0]])
    keys = as_float(walk((2, 2, length, widths.shape[1]), dtype))
    rng = np.random.default_rng(3)
    noisy = (widths % 2 == 1)[:, None]
    keys = np.where(noisy, rng.normal(size=keys.shape) * 3, keys)
    keys[:, :, :, 7] *= 200
    return mx.array(keys.astype(np.float32)).astype(dtype)


def check_operations(keys: mx.array, stored: deltas.StoredDeltas, setting: DeltaConfig) -> None:
    """The operations' twin, outside the bench, stores the same."""
    if mx.default_device() == mx.Device(mx.cpu):
        coding = deltas.LaneCoding.of(setting, 2, keys.shape[3])
        for own, wanted in zip(stored, deltas.store_deltas(keys, setting, coding, 0), strict=True):
            np.testing.assert_array_equal(as_float(own), as_float(wanted))


@every_run
def test_deltas(bench: MetalBench, options):
    setting = setting_of()
    keys = mixed_keys(setting, 32)
    with on_bench(bench, **options):
        stored = check(keys, setting)
    moved = (np.array(stored.sequence) != np.arange(16)).any(axis=3)
    assert moved[:, :, 1].all() and not moved[:, :, 0].any(), "there are sinks in the first one"
    check_operations(keys, stored, setting)


@pytest.mark.parametrize(
    ("head_dim", "size", "dtype", "optimal"),
    [
        (64, 64, mx.bfloat16, True),
        (80, 24, mx.bfloat16, False),
        (96, 8, mx.float16, True),
        (128, 64, mx.float16, True),
        (256, 64, mx.float16, False),
    ],
)
def test_shapes(bench: MetalBench, request, head_dim, size, dtype, optimal):
    if head_dim != 256 and not request.config.getoption("--all"):
        pytest.skip("each shape is compiled anew; --all takes all")
    widths = (7, 6, 5, 4, 3, 2, 2, 4) * 4
    setting = setting_of(widths[: head_dim // 8], None, size, size // 2, optimal)
    keys = walk((1, 2, 2 * size, head_dim), dtype)
    with on_bench(bench):
        stored = check(keys, setting)
        check(keys, setting, 1)
    check_operations(keys, stored, setting)


@pytest.mark.parametrize("kind", ["constant", "alternating", "extreme", "nan", "inf"])
def test_special_keys(bench: MetalBench, kind):
    keys, setting = special_keys(kind, (1, 2, 32, 48), mx.float16), setting_of(sinks=0)
    with on_bench(bench):
        stored = check(keys, setting)
    check_operations(keys, stored, setting)


def test_a_cache_encodes_with_it_whatever_its_rows_are_at(bench: MetalBench):
    """Rows of several lengths, fed token by token: the store has what operations put there."""
    setting = setting_of(WIDTHS, OTHERS)
    rng = np.random.default_rng(2)
    text = [np.cumsum(rng.normal(size=(2, h, 72, 48)) / 4, axis=2) for h in (4, 2, 2)]

    def stored() -> list[np.ndarray]:
        cache = BatchDeltaKVCache([0, 9], setting)
        for steps in (40, *[1] * 32):
            mask, at = cache.make_mask(steps), cache.offset.tolist()[0]
            attend(cache, [x[:, :, at:][:, :, :steps].astype("f4") for x in text], [steps], mask)
        assert cache.encoded == (3, 2)
        arrays = [x for x in cache.state if isinstance(x, mx.array)]
        return [np.array(x) for x in arrays if x.dtype in (mx.uint32, mx.int32, mx.uint8)]

    wanted = stored()
    assert len(wanted) >= 4
    with on_bench(bench):
        for own, other in zip(stored(), wanted, strict=True):
            np.testing.assert_array_equal(own, other)


MUTATIONS = [
    without_barrier(1),
    without_barrier(2),
    without_barrier(3),
    Mutation("steps are cut off", "(bits + 64u) >> 7", "bits >> 7"),
    Mutation("a step of no number", "step >= 0.0f ? step : 0.0f", "step"),
    Mutation("an endless step", "min((bits + 64u) >> 7, 0xf7u)", "(bits + 64u) >> 7"),
    Mutation("another lane's mask", "lane / 4] >> (LANE * (lane % 4))", "lane / 4]"),
    Mutation("the stream before", "first_bits[middle] <= begin", "first_bits[middle] < begin - 64"),
    Mutation("the first code of a word is whole", "bit < begin ? code >> (begin - bit) :", ""),
    Mutation("lanes of one width", "++stream;\n      width", "++stream;\n      int other"),
    Mutation("lanes that have no codes", "while (first_bits[stream + 1] <= bit) {",
             "if (first_bits[stream + 1] <= bit) {"),
    Mutation("words behind the last", "&& bit < first_bits[Streams]", ""),
    Mutation("lanes that are no smaller", "< LANE * Size * width", "<= LANE * Size * width"),
    Mutation("a lane of four channels", "apart < LANE; apart *= 2", "apart < 4; apart *= 2"),
    Mutation("all lanes are held", "begins = held ? begins : ~0ul;", ""),
    Mutation("zeros of lanes that are not", "count = held ? count : Size;", ""),
    Mutation("means of lanes that are not", "means + channel, held}", "means + channel, true}"),
    Mutation("channels in no order", "starts[t * W + channel / 32] >> (channel % 32)",
             "starts[t * W + i / 32] >> (i % 32)"),
    Mutation("one chunk", "stream / Lanes * CHUNK", "0"),
    Mutation("the bits of the first 32 lanes", "bit += simd_sum(bits);", "bit = simd_sum(bits);"),
    Mutation("three fits", "fit < 4", "fit < 3"),
    Mutation("codes of the chunk before", "t % CHUNK == 0", "t == 0"),
    Mutation("channels of a lane one upon another", "codes[next + before]", "codes[next]"),
    Mutation("masks behind each other", "(n_held * chunk) * (CHUNK / 4)", "chunk * (CHUNK / 4)"),
    Mutation("masks of whole chunks", "rank * span", "rank * (CHUNK / 4)"),
    Mutation("masks by lane", "int(popcount(head & ((1u << of) - 1u)))", "of"),
    Mutation("sinks of another block", "(place[0] + block) * Size", "block * Size"),
    Mutation("no sinks", "place[1] - (place", "0 - (place"),
    Mutation("another head's order", "places + head % Heads * D", "places"),
]  # fmt: skip


# Mistakes that take several chunks of tokens to show.
CHUNKS = [
    "one chunk",
    "codes of the chunk before",
    "masks of whole chunks",
    "masks behind each other",
    "the bits of the first 32 lanes",
    "lanes that have no codes",
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(bench: MetalBench, mutation):
    def cases() -> None:
        if mutation.name in CHUNKS:
            setting = setting_of(WIDTHS * 2, OTHERS * 2, 40)
            keys = mixed_keys(setting, 40)
            check(keys, setting)
            keys[:, :, 14:36] = keys[:, :, 14:15]  # a chunk in which nothing begins
            check(keys, setting)
            return
        if mutation.name == "an endless step":
            setting = setting_of()
            check(mixed_keys(setting, 16, mx.bfloat16) * 1e7, setting)
            return
        keys = mixed_keys(setting_of(), 32)
        check(keys, setting_of())
        check(keys[:1], setting_of(), 1)
        check(keys[:1], setting_of(sinks=20))
        check(special_keys("nan", (1, 2, 16, 48), mx.float16), setting_of())
        pairs = mx.where(mx.arange(16) % 4 < 2, 3.0, -3.0)[:, None]  # half of the numbers begin
        # A sink, so that they stay as they come.
        check(mx.broadcast_to(pairs, (1, 2, 16, 48)).astype(mx.float16), setting_of(sinks=1))

    run = with_kernel(bench, "deltas_encode_kernel", cases)
    assert_caught(source_of("deltas_encode_kernel"), mutation, run)


def test_what_it_does_not_take():
    setting = setting_of()
    coding = deltas.LaneCoding.of(setting, 2, 48)
    keys = mx.zeros((1, 2, 32, 48), mx.float16)
    starts, means = mx.zeros((1, 2, 2, 16, 2), mx.uint32), mx.zeros((1, 2, 2, 16, 48))
    tokens, sequence = mx.ones((1, 2, 2, 16)), mx.zeros((1, 2, 2, 16), mx.uint8)
    for wrong, message in (
        ((keys[:, :, :20], starts, means, tokens), "whole blocks of 16 tokens"),
        ((keys.astype(mx.float32), starts, means, tokens), "float16 or bfloat16 keys"),
        ((keys[:, :1], starts, means, tokens), "not of 1 kv heads of 48 channels"),
        ((keys, starts[..., :1], means, tokens), r"starts must have shape \[1, 2, 2, 16, 2\]"),
        ((keys, starts, means.astype(mx.float16), tokens), "means must be mlx.core.float32"),
        ((keys, starts, means, tokens[:, :1]), r"tokens must have shape \[1, 2, 2, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            deltas_encode.write(*wrong, sequence, setting, coding, 0)
