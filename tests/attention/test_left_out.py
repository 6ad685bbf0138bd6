"""Where every kernel is wrong, all are left out, and attention is as without kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.ops import proving
from mlx_delta.ops.backend import METAL
from mlx_delta.ternary.codes import pack_words
from mlx_delta.ternary.linear import TernaryLinear
from tests.attention.test_costs import LAYERS, far_format
from tests.cuda.launches import forget
from tests.gpus import seems_to_have
from tests.tiny import smooth_keys


@contextlib.contextmanager
def wrong_kernels() -> Iterator[None]:
    """As on a Mac whose kernels all give ones."""

    def make(name, **_):
        def launch(output_shapes, output_dtypes, **_):
            return [mx.ones(*x) for x in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    forget()
    with (
        mock.patch.object(mx.fast, "metal_kernel", make),
        mock.patch.object(proving, "_tried", set()),
        mock.patch.object(proving, "_left_out", set()),
        seems_to_have(METAL),
    ):
        yield
    forget()


def answers(setting: DeltaConfig, D: int = 64) -> np.ndarray:
    """What a prompt of 1,200 tokens and three more attend to."""
    cache = DeltaKVCache(setting.for_layer(0, LAYERS))
    keys = mx.array(smooth_keys((1, 2, 1203, D))).astype(mx.float16)
    queries = mx.repeat(keys[:, :, ::-1], 2, axis=1) * 0.3
    outputs = []
    for first, end in [(0, 1200), (1200, 1201), (1201, 1202), (1202, 1203)]:
        new = (x[:, :, first:end] for x in (queries, keys, keys))
        outputs.append(delta_attention(*new, cache, 0.05))
        mx.eval(outputs)
    return np.array(mx.concatenate(outputs, axis=2).astype(mx.float32))


LEVEL = far_format("deltas", level=0.1).sensitivities
SETTINGS = {
    "a threshold": (DeltaConfig(threshold=0.5), {"delta_hold"}),
    "runs": (
        DeltaConfig(threshold_mode="optimal", level=0.1, sensitivities=LEVEL),
        {"token_sequence", "delta_runs"},
    ),
    "codes": (far_format("codes"), {"codes_encode", "values_encode", "codes_decode"}),
    "deltas": (
        far_format("deltas", level=0.1),
        # The last is left out by what the others give, and they do its work apart.
        {"deltas_encode", "token_sequence", "delta_runs", "values_encode", "deltas_decode"},
    ),
    "tiles": (DeltaConfig(threshold=0.5, prefill="tiles"), {"tile_attention", "delta_hold"}),
}


@pytest.mark.parametrize(("setting", "names"), SETTINGS.values(), ids=SETTINGS.keys())
def test_attention(setting, names):
    right = answers(setting)
    with wrong_kernels(), pytest.warns(UserWarning) as said:
        found = answers(setting)
    messages = [str(one.message) for one in said if "[kernels]" in str(one.message)]
    assert {message.split()[1] for message in messages} == names
    # On a GPU the operations add up in another order: a code may be the next one.
    assert np.abs(found - right).mean() < 2e-3 * np.abs(right).mean()


def test_ternary_weights():
    codes = np.random.default_rng(0).integers(0, 3, (64, 128)).astype(np.uint8)
    layer = TernaryLinear(128, 64, bias=False)
    layer.weight, layer.scales = pack_words(mx.array(codes)), mx.ones((64, 1))
    layer.eval()
    x = mx.random.normal((1, 128))
    right = np.array(layer(x))
    with wrong_kernels(), pytest.warns(UserWarning, match="ternary_matvec is left out"):
        found = np.array(layer(x))
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-3)
