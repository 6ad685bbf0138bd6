"""What caches keep written out where no kernel reads stored keys: counted, and given up in time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.attention.hybrid import delta_attention
from mlx_delta.cache import DeltaKVCache, written_out
from tests.tiny import SMALL

DELTAS = SMALL.changed(level=0.03, key_bits=4, value_bits=8)
WIDE = 2 * 2 * 32 * 4  # keys and values of a token: 2 heads of 32, in float32


def decode(cache: DeltaKVCache, tokens: int) -> np.ndarray:
    """The outputs of a prompt of 100 tokens and of some one by one."""
    text = mx.random.normal((1, 2, 100 + tokens, 32), key=mx.random.key(1))
    found = []
    for left, right in [(0, 100), *((i, i + 1) for i in range(100, 100 + tokens))]:
        part = text[:, :, left:right]
        found.append(delta_attention(part, part, part, cache, 0.2))
    return np.array(mx.concatenate(found, axis=2))


def test_it_is_counted_beside_the_cache():
    cache = DeltaKVCache(DELTAS)
    decode(cache, 0)
    assert cache.scratch_nbytes == 0, "of a prompt nothing is kept"
    stored = cache.nbytes
    decode(cache, 1)
    assert cache.scratch_nbytes == 256 * WIDE, "with room for 256 tokens"
    assert cache.nbytes < 256 * WIDE and stored > 0
    assert cache.compact().scratch_nbytes == 0


@pytest.mark.parametrize("free", [0, 128 * 256 * WIDE - 1, 128 * 256 * WIDE], ids=str)
def test_where_memory_is_short_nothing_is_written_out(monkeypatch, free):
    monkeypatch.setattr(written_out, "free_memory", lambda _: (free, "the limit"))
    cache = DeltaKVCache(DELTAS)
    found = decode(cache, 30)
    assert (cache.scratch_nbytes > 0) == (free == 128 * 256 * WIDE)
    monkeypatch.undo()
    np.testing.assert_array_equal(found, decode(DeltaKVCache(DELTAS), 30))
