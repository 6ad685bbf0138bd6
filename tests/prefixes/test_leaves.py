"""A cache of stored keys cut into blocks and put together again."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaKVCache
from mlx_delta.prefixes.leaves import HeldLeaf
from tests.attention.test_hybrid import attend
from tests.cache.settings import CODES, LANES, ROTATED, TEXT

# Of whose first tokens the last is full when two blocks are stored, and full keys begin behind 0.
MANY = dataclasses.replace(LANES, sinks=2 * LANES.block_size + 1)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        *((config, length) for config in (CODES, ROTATED, LANES) for length in (9, 90)),
        (MANY, 3 * LANES.block_size + LANES.window),
    ],
    ids=lambda x: x if isinstance(x, int) else x.key_format,
)
def test_a_cache_of_its_blocks_goes_on_alike(config, length):
    cache = DeltaKVCache(config)
    attend(cache, tuple(x[:, :, :length] for x in TEXT), [length])
    leaf = HeldLeaf.of(cache)
    assert leaf is not None
    blocks = [leaf.block(i) for i in range(leaf.blocks)]
    end = leaf.end(leaf.blocks, leaf.full_from)
    built = HeldLeaf.build(leaf.entry, blocks, end, leaf.full_from, length)
    assert built.read_bytes() == cache.read_bytes()
    after = tuple(x[:, :, length : length + 40] for x in TEXT)
    found = [attend(x, after, [1, 30, 9]) for x in (cache, built)]
    np.testing.assert_array_equal(*found)
    states = [x.compact().state[1:] for x in (cache, built)]
    assert all(mx.array_equal(*pair) for pair in zip(*states, strict=True))


def test_blocks_of_packed_keys_are_refused():
    cache = DeltaKVCache(LANES)
    attend(cache, tuple(x[:, :, :90] for x in TEXT), [90])
    leaf = HeldLeaf.of(cache)
    assert leaf is not None
    old = {**leaf.entry, "types": {**leaf.entry["types"], "masks": "uint32"}}
    with pytest.raises(ValueError, match="its keys are packed, as earlier versions did"):
        HeldLeaf.build(old, [leaf.block(0)], leaf.end(1, 8), 8, 90)
