"""Caches of held keys by lanes: against the specification, their bytes, and what they refuse.

That they go on alike however they are fed, copied, saved, rewound or batched: the tests beside this
one, whose settings have lanes among them.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.method import deltas as ref
from mlx_delta.method.storage import round_to
from tests.attention.test_hybrid import SCALE, attend, inputs
from tests.cache.settings import LANES

from .broken import header, replaced, setting

LENGTH = 90
TEXT = tuple(round_to(x, "float16") for x in inputs(LENGTH, dim=32))
PLAIN = dataclasses.replace(LANES, value_format="plain", value_bits=16, value_widths=None)


def far_keys(config: DeltaConfig) -> np.ndarray:
    """The specification's keys of all whole blocks, [Hkv, n, D]."""
    size, sinks = config.block_size, config.sinks
    weights, salience = config.sensitivities_of_layer(2, 32)
    assert config.key_widths is not None and config.key_widths[0]
    found = TEXT[1][0, :, : LENGTH // size * size].copy()
    for head, first in np.ndindex(2, LENGTH // size):
        rows = slice(first * size, (first + 1) * size)
        widths = np.array(list(map(int, config.key_widths[0][head])))
        block = ref.pack_block(
            TEXT[1][0, head, rows],
            *(weights[head], salience[head], config.run_level, True),
            *(max(0, sinks - rows.start), widths, "float16"),
        )
        found[head, rows] = ref.unpack_block(block, size, widths, "float16")
    found[:, :sinks] = TEXT[1][0, :, :sinks]
    return found


@pytest.mark.parametrize("cuts", [[LENGTH], [40, 1, 1, 30, *[1] * 18]], ids=["at once", "in steps"])
def test_attention_is_that_of_the_specification(cuts):
    queries, keys, values = (x[0] for x in TEXT)
    far = far_keys(PLAIN)
    output = attend(DeltaKVCache(PLAIN), TEXT, cuts)[0]
    size = PLAIN.block_size
    for head, t in np.ndindex(4, LENGTH):
        own = head // 2
        border = max(0, t // size - PLAIN.window_blocks) * size
        k = np.concatenate([far[own, :border], keys[own, border : t + 1]])
        scores = k @ queries[head, t] * SCALE
        weights = np.exp(scores - scores.max())
        wanted = weights @ values[own, : t + 1] / weights.sum()
        np.testing.assert_allclose(output[head, t], wanted, atol=2e-2, err_msg=f"{head} {t}")


def test_bytes_are_those_of_masks_and_codes():
    """Keys that never change: a bit of mask, the codes of the first token, grid and sequence."""
    setting = DeltaConfig(sinks=0, key_format="deltas", key_bits=4, value_bits=16)
    cache = DeltaKVCache(setting)
    text = mx.ones((1, 2, 4096 + 64, 64), mx.float16)
    cache.update(text, text)
    words = 1 + 64 * 64 // 32 + 64 * 4 // 32
    per_block = 2 * (4 * words + 4 + 64 * 3 + 64)
    dense = 2 * 2 * 64
    assert cache.read_bytes() == 63 * per_block + 128 * dense + 4160 * dense
    # Besides room: of a block in the worst case, near keys, values, and counts.
    room = 4 * 2 * (1 + 512) + 192 * dense + 4352 * dense
    assert cache.nbytes <= 64 * (per_block + 2 * 4) + room


def plus_one(array, *place):
    array = mx.array(array)
    array[place] = array[place] + 1
    return array


# header, near, values, payload, counts, low, steps, zeros, sequence, sinks
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: header(s, type="int4"), "int4"),
        (lambda s: header(s, stored=[]), "row counts do not fit"),
        (lambda s: header(s, stored=[99]), "row counts do not fit"),
        (lambda s: header(s, stored=[3]), "3 stored ones"),
        (lambda s: header(s, encoded=[2]), "near keys from position"),
        (lambda s: header(s, lengths=[9999]), "9999 tokens"),
        (lambda s: setting(s, key_bits=9), "key_bits must be between 2 and 7"),
        (lambda s: setting(s, key_widths=[["4" * 31 + "3"] * 2]), "key_widths must be widths"),
        (lambda s: setting(s, key_widths=[["4" * 16] * 2]), "2 kv heads of 16 channels"),
        (lambda s: setting(s, key_widths=[["4" * 32] * 2]), "of row 0 do not fit"),
        (lambda s: s[:-1], "9 parts"),
        (lambda s: replaced(s, 1, s[1].astype(mx.float32)), "near do not fit"),
        (lambda s: replaced(s, 3, None), "lacks one of its buffers"),
        (lambda s: replaced(s, 3, s[3][:, :99]), "of row 0 do not fit"),
        (lambda s: replaced(s, 3, s[3][:, :0]), "of row 0 do not fit"),
        (lambda s: replaced(s, 3, s[3].astype(mx.int32)), "payload do not fit"),
        (lambda s: replaced(s, 3, s[3][0]), "payload do not have the right dim"),
        (lambda s: replaced(s, 3, 0 * s[3]), "of row 0 do not fit"),
        (lambda s: replaced(s, 4, plus_one(s[4], 0, 1, 0)), "of row 0 do not fit"),
        (lambda s: replaced(s, 4, -s[4]), "of row 0 do not fit"),
        (lambda s: replaced(s, 4, s[4][:, :, :5]), "counts do not fit"),
        (lambda s: replaced(s, 5, s[5][..., :16]), "low do not fit"),
        (lambda s: replaced(s, 6, s[6].astype(mx.uint32)), "steps do not fit"),
        (lambda s: replaced(s, 7, s[7][:, :1]), "zeros do not fit"),
        (lambda s: replaced(s, 8, s[8][..., :4]), "sequence do not fit"),
        (lambda s: replaced(s, 8, plus_one(s[8], 0, 1, 0, 3)), "sequences of row 0"),
        (lambda s: replaced(s, 8, 255 - s[8]), "sequences of row 0"),
        (lambda s: replaced(s, 9, None), "sinks do not fit"),
    ],
)
def test_a_damaged_state_is_refused(break_it, message):
    cache = DeltaKVCache(PLAIN)
    attend(cache, TEXT, [LENGTH])
    with pytest.raises(ValueError, match=message):
        DeltaKVCache.from_state(break_it(cache.state))


def test_the_last_words_have_two_behind_them():
    """Which the kernel reads: also where a row is cut out, or a state has no room to grow."""
    cache = DeltaKVCache(PLAIN)
    attend(cache, TEXT, [LENGTH])
    state = cache.state
    words = int(mx.array(state[4]).sum())
    tight = replaced(state, 3, state[3][:, : words + 2])
    assert DeltaKVCache.from_state(tight).offset == LENGTH
    with pytest.raises(ValueError, match=f"its payload of {words + 1} words"):
        DeltaKVCache.from_state(replaced(state, 3, state[3][:, : words + 1]))


def test_a_state_without_sequences_is_one_whose_tokens_are_in_order():
    """As the version before this one wrote it."""
    setting = dataclasses.replace(PLAIN, sinks=0)
    cache = DeltaKVCache(setting)
    _, keys, values = TEXT
    # Keys that are all alike stay in the order of the text.
    cache.update(mx.array(0 * keys + 1), mx.array(values))
    old = [*cache.state[:8], *cache.state[9:]]
    again = DeltaKVCache.from_state(old)
    for own, found in zip(cache.keys_and_values(), again.keys_and_values(), strict=True):
        assert mx.array_equal(own, found)
    assert len(again.state) == len(cache.state)


def test_a_block_of_the_most_words_leaves_room_for_them():
    """Of which the last one just fits, and nothing is behind it unless that is counted too."""
    cache = DeltaKVCache(dataclasses.replace(PLAIN, level=0.0))
    for t in range(LENGTH):
        cache.update_and_fetch(*(mx.array(x[:, :, t : t + 1]) for x in TEXT[1:]))
        if cache.full_from != [0]:
            assert DeltaKVCache.from_state(cache.state).offset == t + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "key_bits must be between 2 and 7, with key_format='deltas'"),
        ({"key_bits": 1.5}, "between 2 and 7, with key_format='deltas', but got 1.5"),
        ({"key_bits": 4, "threshold": 1.0}, "needs threshold_mode 'optimal' or 'greedy'"),
        ({"key_bits": 4, "key_widths": (("4" * 9,),)}, "must be widths of codes"),
        ({"key_bits": 4, "key_widths": (("8" * 8,),)}, "must be widths of codes"),
        ({"key_bits": 4, "key_widths": (("4" * 8, "4" * 16),)}, "must be widths of codes"),
    ],
)
def test_settings_that_can_not_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig(key_format="deltas", **changes)
