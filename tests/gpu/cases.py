"""Every kernel against its specification, on whatever back-end there is: small, and quickly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_delta.ops.ternary_matvec import ternary_matvec
from mlx_delta.ternary.codes import pack_words

from ..kernels import (
    code_case,
    delta_case,
    test_codes_encode,
    test_deltas_encode,
    test_sequence,
    test_values_encode,
    tile_case,
)
from ..kernels.code_case import CodedCase, Kinds, coded
from ..kernels.common import walk
from ..kernels.delta_case import DeltaCase, lanes
from ..kernels.test_runs import check_runs
from ..metal_cpu import MetalBench

HALF, BF16, FLOAT = mx.float16, mx.bfloat16, mx.float32
# Of 48 pairs each; odd and even numbers of rows, and heads without some kinds.
MIXED = ({2: 1, 3: 3, 4: 3, 5: 1, 6: 2, 8: 1}, {4: 12})


def _codes(case: CodedCase, mask: bool = False) -> None:
    code_case.check(MetalBench(strict=False), case, mask)


def _deltas(case: DeltaCase, mask: bool = False) -> None:
    delta_case.check(MetalBench(strict=False), case, mask)


def _runs(optimal: bool) -> None:
    check_runs(walk((1, 2, 128, 80), HALF), optimal, 64)


def _sequence() -> None:
    keys = test_sequence.mixed(walk((2, 2, 128, 80), HALF))
    test_sequence.check(keys, 64, 4)
    test_sequence.check(test_sequence.repeated((1, 2, 64, 80)), 64)


def _coded(kinds: tuple[Kinds, Kinds]) -> None:
    test_codes_encode.check(walk((1, 2, 128, 48), HALF), kinds, 64, minded=True)


def _stored() -> None:
    setting = test_deltas_encode.setting_of(size=64)
    test_deltas_encode.check(test_deltas_encode.mixed_keys(setting, 128), setting)


def _turned(head_dim: int, widths: tuple[int, ...], dtype: mx.Dtype) -> None:
    values = test_values_encode.numbers((2, len(widths), 70, head_dim), dtype)
    test_values_encode.check(values, widths)


def _tile_pack() -> None:
    keys = mx.random.normal((1, 2, 128, 40), key=mx.random.key(0)).astype(HALF)
    tile_case.check_pack(keys, 64)


def _ternary(rows: int, quantize: bool) -> None:
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 3, (36, 96)).astype(np.uint8)
    x = rng.normal(size=(rows, 96)).astype(np.float32) * 3
    words, scales = pack_words(mx.array(codes)), mx.full((36, 3), 0.5)
    found = np.array(ternary_matvec(mx.array(x), words, scales, quantize))
    values, steps = x.astype(np.float64), np.ones((rows, 1))
    if quantize:
        scale = np.float32(127) / np.abs(x).max(axis=1, keepdims=True)
        values, steps = np.round(x * scale).astype(np.float64), 1 / scale
    wanted = values @ (codes.astype(np.float64) - 1).T * steps * 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


CASES: dict[str, Callable[[], None]] = {
    "codes 4 bits": partial(_codes, CodedCase(coded({4: 8}, (4, 4)), (300,), 1, (8, 2), 64, HALF)),
    "codes of all widths": partial(
        _codes, CodedCase(coded(MIXED, (8, 3)), (2, 300, 130), 2, (4, 2), 96, FLOAT), True
    ),
    "codes, turned": partial(_codes, CodedCase(coded((), (4, 4)), (200,), 1, (2, 2), 128, BF16)),
    "codes, D 256": partial(
        _codes, CodedCase(coded({5: 8, 6: 4, 8: 8}, (4,)), (200,), 1, (4, 1), 256, HALF)
    ),
    "codes, plain values": partial(
        _codes, CodedCase(coded(({4: 10}, {5: 8}), None), (200,), 1, (4, 2), 80, HALF)
    ),
    "codes, long": partial(_codes, CodedCase(coded({4: 8}, (4, 4)), (1000,), 1, (8, 2), 64, HALF)),
    "held, 4 bits": partial(_deltas, DeltaCase(lanes(), (300,), 1, (8, 2), 64, HALF)),
    "held, wide codes": partial(
        _deltas,
        DeltaCase(
            lanes((6, 5, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2), (8, 2), (4, *(3,) * 11)),
            *((2, 300, 130), 2, (4, 2), 96, FLOAT),
        ),
        True,
    ),
    "tokens in sequence": _sequence,
    "runs, optimal": partial(_runs, True),
    "runs, greedy": partial(_runs, False),
    "codes, encoded": partial(_coded, test_codes_encode.KINDS),
    "held, encoded": _stored,
    "values, encoded": partial(_turned, 128, (3, 4), HALF),
    "values of all widths": partial(_turned, 96, test_values_encode.ALL, BF16),
    "tiles, packed": _tile_pack,
    "tiles, chosen": partial(tile_case.check_choice, tile_case.SMALL),
    "tiles, attention": partial(tile_case.check_attention, tile_case.SMALL, tile_case.LISTED),
    "ternary, one row": partial(_ternary, 1, True),
    "ternary, four rows": partial(_ternary, 4, False),
}

# Of each kernel that decodes or decides one case, for NVIDIA's checker, which is slow.
FEW = ("codes 4 bits", "held, 4 bits", "tokens in sequence", "runs, greedy", "ternary, one row")
