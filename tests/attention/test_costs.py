"""What attention costs besides arithmetic: operations, uploads, fills and waits, each counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention import masks
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.measure.operations import count_operations
from mlx_delta.ops import blocks as whole_blocks
from mlx_delta.ops import building, far_kernel, proving
from mlx_delta.ops.backend import METAL
from mlx_delta.ops.codes import Coding
from mlx_delta.ops.deltas import LaneCoding
from mlx_delta.sensitivities import Sensitivities
from tests.cuda.launches import forget
from tests.gpus import Everything, seems_to_have
from tests.tiny import SMALL, smooth_keys

LAYERS = 4
DELTAS = DeltaConfig(key_bits=4, value_bits=4)
CODES = DeltaConfig(key_format="codes", key_bits=4, value_bits=4)
each_form = pytest.mark.parametrize("setting", [DELTAS, CODES], ids=["deltas", "codes"])
REAL_ARRAY = mx.array


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count uploads (``mx.array``), fills (``mx.zeros``) and waits (``mx.eval``, ``np.array``)."""
    counts: Counter = Counter()

    class Meta(type):
        def __instancecheck__(cls, x):
            return isinstance(x, REAL_ARRAY)

        def __call__(cls, *args, **kwargs):
            counts["uploads"] += 1
            return REAL_ARRAY(*args, **kwargs)

    class Array(metaclass=Meta):
        pass

    def counted(owner, name, what):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if what != "waits" or owner is mx or isinstance(args[0], REAL_ARRAY):
                counts[what] += 1
            return real(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with (
        mock.patch.object(mx, "array", Array),
        counted(mx, "zeros", "fills"),
        counted(mx, "eval", "waits"),
        counted(np, "array", "waits"),
        counted(np, "asarray", "waits"),
    ):
        yield counts


@contextlib.contextmanager
def kernels_that_count() -> Iterator[list[str]]:
    """As on a Mac, but that kernels give ones and are only counted."""
    launched: list[str] = []

    def make(name, **_):
        def launch(output_shapes, output_dtypes, **_):
            launched.append(name)
            return [mx.ones(*x) for x in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    forget()
    far_kernel.row_numbers.cache_clear()
    with (
        mock.patch.object(mx.fast, "metal_kernel", make),
        mock.patch.object(proving, "_tried", Everything()),
        mock.patch.object(building, "Launched", lambda name, kernel: kernel),
        seems_to_have(METAL),
    ):
        yield launched
    forget()
    far_kernel.row_numbers.cache_clear()


def far_format(key_format: str, **changes) -> DeltaConfig:
    """Keys in such a format and rotated values, of two kv heads of 64."""
    widths = (("4" * 64,) * 2,) * LAYERS
    weights = [np.full((2, 64), 1 / 64, np.float32)] * LAYERS
    return DeltaConfig(
        **{"key_format": key_format, "key_bits": 4, "key_widths": widths},
        **{"value_format": "rotated", "value_bits": 4},
        sensitivities=Sensitivities(weights),
        **changes,
    )


FORMATS = {
    "codes": (far_format("codes"), ["codes_encode"]),
    "deltas": (far_format("deltas", level=0.1), ["token_sequence", "delta_runs", "deltas_encode"]),
}


def tokens(n: int, head_dim: int = 32) -> list[mx.array]:
    keys = mx.array(smooth_keys((1, 2, n, head_dim))).astype(mx.float16)
    return [mx.repeat(keys, 2, axis=1), keys, keys]


def feed(caches: list[DeltaKVCache], n: int, new: list[mx.array] | None = None) -> list[mx.array]:
    new = new or tokens(n)
    return [delta_attention(*new, cache, 0.2) for cache in caches]


@each_form
def test_a_token_uploads_one_array_for_all_layers_and_fills_none(setting):
    caches = [DeltaKVCache(setting) for _ in range(LAYERS)]
    mx.eval(feed(caches, 299))
    token = tokens(1)
    with kernels_that_count() as launched:
        feed(caches, 1, token)  # what is made once
        with counting() as counts:
            feed(caches, 1, token)
    assert launched[-2:] == [f"{setting.key_format}_decode", "codes_combine"]
    assert counts == {"uploads": 1}, "the rows' numbers"


def test_a_token_that_finishes_a_block_uploads_offsets_and_waits_for_counts_known_for_long():
    caches = [DeltaKVCache(DELTAS) for _ in range(LAYERS)]
    mx.eval(feed(caches, 313))
    for _ in range(7):
        mx.eval(feed(caches, 1))  # up to a block's end
    with kernels_that_count(), counting() as counts:
        feed(caches, 1)
    assert caches[0].encoded == (4,)
    waits = counts["waits"] - LAYERS  # runs are cut in NumPy where there is no GPU
    assert waits <= 2 * LAYERS, "one for all counts of a layer, and to read them"


@pytest.mark.parametrize("chunk", [200, 400])
def test_a_chunk_of_a_prompt_waits_for_nothing(chunk):
    caches = [DeltaKVCache(CODES) for _ in range(LAYERS)]
    with kernels_that_count(), counting() as counts:
        feed(caches, chunk)
    assert counts["waits"] == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("blocks", [1, 5])
def test_new_far_blocks_of_a_layer_take_one_to_three_launches_and_nothing_else(name, blocks):
    """Operations of their twins: 181 and 5 uploads for codes, 384 and 17 uploads for held keys."""
    setting, launches = FORMATS[name]
    keys, setting = tokens(64 * blocks, 64)[1], setting.for_layer(0, LAYERS)
    coding: Any = {"codes": Coding, "deltas": LaneCoding}[name].of(setting, 2, 64)
    felt = mx.ones((2, 2, 64))
    mx.eval(keys, felt)

    def encoded() -> Sequence[mx.array]:
        if name == "codes":
            return whole_blocks.encode_codes(keys, coding, 64, felt)
        return whole_blocks.encode_deltas(keys, setting, coding, 3)

    with kernels_that_count() as launched:
        encoded()  # what is made once
        launched.clear()
        with counting() as counts:
            found = encoded()
    assert launched == launches and not counts
    assert count_operations(*found) <= len(found), "what stands for the outputs here"


def test_values_of_new_far_blocks_take_a_launch_and_nothing_else():
    """Operations of its twin: 379 for two widths."""
    values = tokens(320, 64)[2]
    mx.eval(values)
    with kernels_that_count() as launched:
        whole_blocks.encode_values(values, (4, 3))
        launched.clear()
        with counting() as counts:
            found = whole_blocks.encode_values(values, (4, 3))
    assert launched == ["values_encode"] and not counts
    assert count_operations(*found) <= len(found), "what stands for the outputs here"


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_that_finishes_a_far_block(name):
    """The new block's place in the buffers is left to operations."""
    setting, launches = FORMATS[name]
    caches = [DeltaKVCache(setting.for_layer(i, LAYERS)) for i in range(LAYERS)]
    text, token = tokens(319, 64), tokens(1, 64)
    with kernels_that_count() as launched:
        mx.eval(feed(caches, 319, text), [cache.state for cache in caches])
        done = caches[0].encoded
        launched.clear()
        with counting() as counts:
            feed(caches, 1, token)
            feed(caches, 1, token)
    assert caches[0].encoded == (done[0] + 1,)
    assert [x for x in launched if x in launches] == LAYERS * launches
    assert launched.count("values_encode") == LAYERS, "one for all heads"
    assert counts["waits"] <= (2 * LAYERS if name == "deltas" else 0), (
        "the counts before, long known"
    )


def test_moving_a_prompts_words_together_uploads_numbers_of_blocks_not_of_words():
    cache = DeltaKVCache(DELTAS)
    feed([cache], 1600)
    sizes = []
    with mock.patch.object(mx, "arange", wraps=mx.arange), counting() as counts:
        real = np.stack
        with mock.patch.object(np, "stack", lambda x: sizes.append(len(x[0])) or real(x)):
            mx.eval(cache.state[1:])
    assert sizes == [2 * cache.encoded[0]], "a number for each block and head"
    assert counts["uploads"] <= 3


def test_masks_of_positions_are_made_once_for_all_layers():
    caches = [DeltaKVCache(SMALL) for _ in range(LAYERS)]
    with mock.patch.object(masks, "positions", wraps=masks.positions) as made:
        feed(caches, 300)
        assert made.call_count == 3, "sub-chunks of 128 queries, not times layers"
        feed(caches, 300)
        assert made.call_count == 3 + 3, "and other positions anew"
        assert masks._of_one_step.cache_info().currsize == 1, "those of the last step only"


@pytest.mark.parametrize("blocks", [1, 16])
@pytest.mark.parametrize("run_value", ["mean", "first"])
def test_holding_in_full_takes_one_launch_with_kernels_and_few_operations_beside(blocks, run_value):
    setting = DeltaConfig(threshold=1.0, run_value=run_value)
    keys = tokens(64 * blocks, 64)[1]
    with kernels_that_count() as launched:
        held, zeros = whole_blocks.hold(keys, setting, 3)
    assert launched == ["delta_hold"]
    assert count_operations(held, zeros) <= 20, "543 when every token was a few operations"


@pytest.mark.parametrize(
    "setting",
    [DeltaConfig(threshold=1.0), DeltaConfig.paper().resolve(1280)],
    ids=["blocks", "paper"],
)
def test_without_a_gpu_holding_leaves_no_operations_for_each_token_in_the_graph(setting):
    if mx.default_device() == mx.Device(mx.gpu):
        pytest.skip("on a GPU the steps are MLX's own")
    keys = tokens(640, 64)[1].astype(mx.float32)
    held, zeros = whole_blocks.hold(keys, setting, 0)
    assert count_operations(held, zeros) <= 20
