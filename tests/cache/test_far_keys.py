"""What all far keys share that are not in full: waiting for nothing, states, and refusals."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.cache.payload_log import PayloadLog
from mlx_delta.sensitivities import Sensitivities
from tests.attention.test_hybrid import attend, inputs
from tests.tiny import SMALL, smooth_keys

from .broken import header

DELTAS = SMALL.changed(level=0.03, key_bits=4, value_bits=16)
CODES = SMALL.changed(key_format="codes", key_bits=4, value_bits=16)
TEXT = tuple(x.astype(np.float16) for x in inputs(90))


def fed_cache(config: DeltaConfig = DELTAS) -> DeltaKVCache:
    cache = DeltaKVCache(config)
    attend(cache, TEXT, [90])
    return cache


def test_decode_waits_for_no_count():
    """A block's words are moved together when the next block comes, not when it is encoded."""
    keys = mx.array(smooth_keys((1, 2, 40, 64))).astype(mx.float16)
    cache = DeltaKVCache(DeltaConfig(key_bits=4, block_size=8, window=0))
    moved = []
    with mock.patch.object(
        PayloadLog, "_settle_row", autospec=True, side_effect=PayloadLog._settle_row
    ) as spy:
        for t in range(40):
            cache.update(*[keys[:, :, t : t + 1]] * 2)
            moved.append(spy.call_count)
    encoded = [t // 8 for t in range(40)]
    assert moved == [max(0, n - 1) for n in encoded]


@pytest.mark.parametrize("key_bits", [None, 4])
@pytest.mark.parametrize("mode", ["optimal", "greedy"])
def test_a_saved_state_keeps_its_sensitivities(mode, key_bits):
    weights = np.random.default_rng(0).lognormal(0, 1, (2, 32))
    config = DeltaConfig(
        **{"block_size": 16, "window": 16, "sinks": 5, "threshold_mode": mode, "level": 0.3},
        sensitivities=Sensitivities([weights]),
        key_bits=key_bits,
    )
    keys = mx.array(smooth_keys((1, 2, 80, 32))).astype(mx.float16)
    whole, first = DeltaKVCache(config), DeltaKVCache(config)
    whole.update(keys, keys)
    first.update(keys[:, :, :40], keys[:, :, :40])
    again = DeltaKVCache()
    again.state = first.state
    assert again.config == config
    again.update(keys[:, :, 40:], keys[:, :, 40:])
    np.testing.assert_array_equal(again.keys_and_values()[0], whole.keys_and_values()[0])


# Bad input.


@pytest.mark.parametrize("config", [DELTAS, CODES], ids=["deltas", "codes"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: header(s, version=7), "version 7"),
        (lambda s: header(s, type="int4"), "int4"),
        (lambda s: header(s, firsts=[8]), "near keys from position 8"),
        (lambda s: header(s, lengths=[9999]), "9999 tokens"),
        (lambda s: header(s, encoded=[2]), "near keys from position"),
        (lambda s: header(s, encoded=[99]), "99 encoded blocks"),
        (lambda s: header(s, lost=[7]), "7 blocks without full keys"),
        (lambda s: header(s, lost=[12]), "12 blocks without full keys"),
        (lambda s: header(s, lost=[]), "row counts do not fit"),
        (lambda s: [s[0], s[1][:, :, :8], *s[2:]], "near do not fit"),
        (lambda s: [*s[:-1], s[-1][:, :, :1]], "sinks do not fit"),
    ],
)
def test_a_damaged_state_is_refused(break_it, message, config):
    with pytest.raises(ValueError, match=message):
        DeltaKVCache.from_state(break_it(fed_cache(config).state))


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "cache.safetensors"
    save_prompt_cache(str(file), [fed_cache()])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RuntimeError):
        load_prompt_cache(str(file))


def test_another_models_cache_is_refused():
    cache = fed_cache()
    for shape in ((1, 3, 1, 16), (1, 2, 1, 32)):
        new = mx.zeros(shape)
        with pytest.raises(ValueError, match="the cache is of a model with kv heads and head dim"):
            cache.update(new, new)
    new = mx.zeros((2, 2, 1, 16))
    with pytest.raises(ValueError, match="the cache has 1 rows but these keys have 2"):
        cache.update(new, new)


@pytest.mark.parametrize("form", ["deltas", "codes"])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 9, 20), mx.float32, "head_dim that is a multiple of 16"),
        ((1, 1, 9, 512), mx.float32, "up to 256, but got 512"),
        ((1, 1, 9, 64), mx.int32, "must be float16, bfloat16 or float32"),
    ],
)
def test_what_no_kernel_supports_is_refused(form, shape, dtype, message):
    cache = DeltaKVCache(DeltaConfig(key_format=form, key_bits=4))
    with pytest.raises(ValueError, match=message):
        cache.update(mx.zeros(shape, dtype), mx.zeros(shape, dtype))
    assert cache.empty()
