"""Keys near the end of their type's range: stretched means lie beyond it, and stay finite."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.cache import DeltaKVCache
from mlx_delta.method import deltas
from mlx_delta.method.runs import block_runs
from mlx_delta.method.storage import round_to
from mlx_delta.widths import even_lane_widths

LARGEST = 65504
SETTINGS = {
    "in full": {},
    "by lanes of 2 or 3 bits": {"key_format": "deltas", "key_bits": 2.5},
    "by lanes": {"key_format": "deltas", "key_bits": 4},
}


def keys_at_the_end(sign: int) -> np.ndarray:
    """Keys [64, 32], most of them at the end of float16's range."""
    apart = np.random.default_rng(0).normal(size=(64, 32)) ** 4 * 3000
    keys = sign * np.maximum(LARGEST - apart, -LARGEST)
    return keys.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("storage", SETTINGS)
@pytest.mark.parametrize("mode", ["optimal", "greedy"])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_keys_are_held_as_finite_ones(storage, mode, sign):
    config = DeltaConfig(threshold_mode=mode, level=1e9, sinks=0, window=0, **SETTINGS[storage])
    keys = keys_at_the_end(sign)
    felt = [x[0] for x in config.sensitivities_of_layer(1, 32)]
    held, _ = block_runs(keys, *felt, 1e9, optimal=mode == "optimal", sinks=0)
    assert np.abs(held).max() > 65520, "else nothing is beyond the range"
    cache = DeltaKVCache(config)
    text = mx.array(np.concatenate([keys, keys[:1]])).astype(mx.float16)[None, None]
    cache.update(text, text)
    found = np.array(cache.keys_and_values()[0].astype(mx.float32))[0, 0, :64]
    if config.key_bits is None:
        wanted = round_to(held, "float16")
    else:
        widths = even_lane_widths(1, 32, config.key_bits)[0]
        block = deltas.pack_block(keys, *felt, 1e9, mode == "optimal", 0, widths, "float16")
        wanted = deltas.unpack_block(block, 64, widths, "float16")
    assert np.isfinite(wanted).all()
    np.testing.assert_array_equal(found, wanted)
