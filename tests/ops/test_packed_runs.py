"""Runs that are cut by their costs, in the packed format: nothing of the format changes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.cache import DeltaKVCache
from mlx_delta.config import KEY_BITS
from mlx_delta.method import runs
from mlx_delta.method import storage as ref
from mlx_delta.ops import pack
from mlx_delta.sensitivities import Sensitivities

from ..tiny import smooth_keys

HALVES = {"float16": mx.float16, "bfloat16": mx.bfloat16}


def _setting(mode: str, bits: int) -> DeltaConfig:
    weights = np.random.default_rng(0).lognormal(0, 1, (2, 32))
    return DeltaConfig(
        block_size=16,
        window=16,
        sinks=5,
        threshold_mode=mode,
        level=0.3,
        sensitivities=Sensitivities([weights]),
        key_bits=bits,
    )


@pytest.mark.parametrize("mode", ["optimal", "greedy"])
@pytest.mark.parametrize("bits", KEY_BITS)
@pytest.mark.parametrize("kind", HALVES)
def test_packed_as_specified(mode, bits, kind):
    config = _setting(mode, bits)
    keys = mx.array(smooth_keys((1, 2, 48, 32))).astype(HALVES[kind])
    packed = pack.pack_blocks(keys, config, 0)
    masks, counts, payload = (np.array(x) for x in (packed.masks, packed.counts, packed.payload))
    for head, block in np.ndindex(2, 3):
        own = np.array(keys[0, head, block * 16 : block * 16 + 16].astype(mx.float32))
        felt = (x[head] for x in config.sensitivities_of_layer(2, 32))
        optimal = mode == "optimal"
        means, starts = runs.block_runs(own, *felt, 0.3, optimal, config.sinks - 16 * block)
        grid = ref.block_grid(own, bits, kind) if bits < 16 else None
        wanted = ref.pack_runs(means, starts, grid, bits, kind)
        np.testing.assert_array_equal(masks[0, head, block], wanted.mask)
        assert counts[0, head, block].tolist() == [wanted.count, (~starts).sum()]
        got = payload[0, head, block][: len(wanted.payload)].copy()
        if bits == 16 and wanted.count % 2:
            got[-1] &= 0xFFFF  # the last half is not written
        differing = np.bitwise_count(got ^ wanted.payload).sum()
        assert differing <= 2 * len(got) // 100  # a mean on the border of two values may round


@pytest.mark.parametrize("mode", ["optimal", "greedy"])
def test_packed_keys_read_as_dense_ones(mode):
    packed, dense = (DeltaKVCache(_setting(mode, 16).changed(key_bits=bits)) for bits in (16, None))
    keys = mx.array(smooth_keys((1, 2, 80, 32))).astype(mx.float16)
    for cache in (packed, dense):
        cache.update(keys[:, :, :50], keys[:, :, :50])
        cache.update(keys[:, :, 50:], keys[:, :, 50:])
    np.testing.assert_array_equal(packed.keys_and_values()[0], dense.keys_and_values()[0])
    np.testing.assert_array_equal(packed.zeros[:, :, :4], dense.zeros[:, :, :4])


@pytest.mark.parametrize("bits", [None, 4])
def test_a_saved_state_keeps_its_sensitivities(bits):
    config = _setting("optimal", 4).changed(key_bits=bits)
    keys = mx.array(smooth_keys((1, 2, 80, 32))).astype(mx.float16)
    whole, first = DeltaKVCache(config), DeltaKVCache(config)
    whole.update(keys, keys)
    first.update(keys[:, :, :40], keys[:, :, :40])
    again = DeltaKVCache()
    again.state = first.state
    assert again.config == config
    again.update(keys[:, :, 40:], keys[:, :, 40:])
    np.testing.assert_array_equal(again.keys_and_values()[0], whole.keys_and_values()[0])
