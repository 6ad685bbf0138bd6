"""What caches say of themselves."""

from __future__ import annotations

import pytest

from mlx_delta import DeltaKVCache
from tests.attention.test_hybrid import KV_HEADS, attend
from tests.cache.settings import CODES, LANES, LENGTH, TEXT
from tests.tiny import SMALL


@pytest.mark.parametrize(
    ("config", "least", "most"),
    [(CODES, 0.2, 0.5), (LANES, 0.2, 0.5), (SMALL, 1.0, 1.0)],
    ids=["codes", "lanes", "in-full"],
)
def test_bytes_of_far_tokens_are_all_but_those_of_the_near_ones(config, least, most):
    cache = DeltaKVCache(config)
    attend(cache, TEXT, [LENGTH])
    far = cache.encoded[0] * config.block_size
    token = KV_HEADS * (32 + 32) * 2  # keys and values, of 16 bits each
    own, dense = cache.far_bytes(2)
    assert (own, dense) == (cache.read_bytes(2) - (LENGTH - far) * token, far * token)
    assert least * dense <= own <= most * dense


def test_where_no_token_is_far_there_are_no_far_bytes():
    cache = DeltaKVCache(CODES)
    assert cache.far_bytes(2) == (0, 0)
    attend(cache, TEXT, [CODES.block_size])
    assert cache.far_bytes(2) == (0, 0)
