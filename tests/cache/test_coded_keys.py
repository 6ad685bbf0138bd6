"""Caches of coded keys and turned values: against the specification, and what they refuse.

That they go on alike however they are fed, copied, saved, rewound or batched: the tests beside this
one, whose settings have codes among them.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.cache import rewind, written_out
from mlx_delta.method import codes as ref
from mlx_delta.method.storage import round_to
from mlx_delta.method.values import decode_value, encode_value
from mlx_delta.ops.codes import Coding
from tests.attention.test_hybrid import SCALE, attend, inputs
from tests.cache.settings import CODES, ROTATED
from tests.tiny import SMALL

from .broken import header, replaced, setting

LENGTH = 90
TEXT = tuple(round_to(x, "float16") for x in inputs(LENGTH, dim=32))
each_coding = pytest.mark.parametrize("config", [CODES, ROTATED], ids=["widths", "rotated"])


def fed_cache(config: DeltaConfig = CODES) -> DeltaKVCache:
    cache = DeltaKVCache(config)
    attend(cache, TEXT, [LENGTH])
    return cache


def far_keys(config: DeltaConfig) -> np.ndarray:
    """The specification's keys of all whole blocks, [Hkv, n, D]."""
    size, sinks = config.block_size, config.sinks
    coding = Coding.of(config, 2, 32)
    whole = LENGTH // size * size
    found = TEXT[1][0, :, :whole].copy()
    for head, first in np.ndindex(2, whole // size):
        rows = slice(first * size, (first + 1) * size)
        own = TEXT[1][0, head, rows]
        own = ref.turn(own, "float16") if coding.turned else own
        order, kinds = np.array(coding.order[head]), coding.rows[head]
        block = ref.code_block(own, order, kinds, "float16")
        decoded = ref.decode_block(block, order, kinds, "float16")
        found[head, rows] = decoded @ ref.hadamard(32) if coding.turned else decoded
    found[:, :sinks] = TEXT[1][0, :, :sinks]
    return found


def far_values(config: DeltaConfig) -> np.ndarray:
    """The specification's values of all tokens, [Hkv, n, Dv]."""
    widths = (4, 4) if config.value_widths is None else config.value_widths[0]
    found = []
    for own, width in zip(TEXT[2][0], widths, strict=True):
        rows = [
            decode_value(*encode_value(x[None], [width], "float16"), [width], 32)[0] for x in own
        ]
        found.append(np.stack(rows) @ ref.hadamard(32))
    values = np.stack(found)
    values[:, : config.sinks] = TEXT[2][0, :, : config.sinks]
    return values


@each_coding
@pytest.mark.parametrize("cuts", [[LENGTH], [40, 1, 1, 30, *[1] * 18]], ids=["at once", "in steps"])
def test_attention_is_that_of_the_specification(config, cuts):
    queries, keys, values = (x[0] for x in TEXT)
    keys_far, values_far = far_keys(config), far_values(config)
    output = attend(DeltaKVCache(config), TEXT, cuts)[0]
    size = config.block_size
    for head, t in np.ndindex(4, LENGTH):
        own = head // 2
        border = max(0, t // size - config.window_blocks) * size
        k = np.concatenate([keys_far[own, :border], keys[own, border : t + 1]])
        v = np.concatenate([values_far[own, :border], values[own, border : t + 1]])
        scores = k @ queries[head, t] * SCALE
        weights = np.exp(scores - scores.max())
        wanted = weights @ v / weights.sum()
        np.testing.assert_allclose(output[head, t], wanted, atol=2e-2, err_msg=f"{head} {t}")


@pytest.mark.parametrize(
    "config",
    [CODES, ROTATED, SMALL.changed(level=0.03, key_bits=4, value_bits=8)],
    ids=["widths", "rotated", "deltas"],
)
def test_decode_is_alike_with_and_without_what_is_written_out(config, monkeypatch):
    outputs = []
    for most in (written_out.MOST_BYTES, 0):
        monkeypatch.setattr(written_out, "MOST_BYTES", most)
        cache = DeltaKVCache(config)
        found = [attend(cache, tuple(x[:, :, :40] for x in TEXT), [40])]
        part = tuple(x[:, :, 40:] for x in TEXT)
        found.append(attend(cache, part, [1, 1, 1, 2, *[1] * 20]))
        assert (cache._written._keys is None) == (most == 0)
        rewind([cache], 3)
        assert cache._written._keys is None
        start = cache.offset
        found.append(attend(cache, tuple(x[:, :, start:] for x in TEXT), [1, 1, 7, 1, 1]))
        outputs.append(np.concatenate(found, axis=2))
    np.testing.assert_array_equal(*outputs)


def test_a_block_that_becomes_far_is_all_that_is_written_out(monkeypatch):
    cache = fed_cache()
    unpacked = []
    original = written_out.unpack
    monkeypatch.setattr(
        written_out, "unpack", lambda *args: unpacked.append(args[1]) or original(*args)
    )
    for i in range(20):
        attend(cache, tuple(x[:, :, i : i + 1] for x in TEXT), [1])
    assert unpacked == [1, 1]  # of 110 tokens in blocks of 8


def test_bytes_are_those_of_codes():
    """Far tokens of 64 channels: 4.5 bits a key's number and 4.125 a value's; near ones 16."""
    setting = DeltaConfig(sinks=0, key_format="codes", key_bits=4, value_bits=4)
    cache = DeltaKVCache(setting)
    text = mx.zeros((1, 2, 4096 + 64, 64), mx.float16)
    cache.update(text, text)
    dense = 2 * 2 * 64 * 2
    assert cache.read_bytes() == (63 * 64 * dense * 8.625 / 32) + 128 * dense
    room = 192 * dense
    assert cache.nbytes == (64 * 64 * dense * 8.625 / 32) + room


def test_bytes_are_those_of_the_arrays():
    """Heads of four and of three rows of words: nothing is padded between them."""
    cache = fed_cache()
    _, near, *values, words, grid, sinks = cache.compact().state
    *coded, near_values, value_sinks = values
    blocks = LENGTH // 8 - CODES.window_blocks
    assert words.shape == (1, blocks, 4 + 3, 8) and coded[0].shape[2] == 8 * blocks
    far = sum(x.nbytes for x in (words, grid, sinks, *coded, value_sinks))
    seen = LENGTH - 8 * blocks
    assert cache.read_bytes() == far + near[:, :, :seen].nbytes + near_values[:, :, :seen].nbytes


# header, near, words of values, scales, near values, their sinks, words, grid, sinks
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: header(s, type="int4"), "int4"),
        (lambda s: header(s, coded=[]), "row counts do not fit"),
        (lambda s: header(s, coded=[99]), "99. coded blocks of"),
        (lambda s: header(s, coded=[3]), "3 stored ones"),
        (lambda s: header(s, encoded=[2]), "near keys from position"),
        (lambda s: header(s, coded_values=[4]), "coded in .4. blocks"),
        (lambda s: header(s, coded_values=[99]), "coded in .99. blocks"),
        (lambda s: header(s, coded_values=[]), "saved values do not fit"),
        (lambda s: header(s, value_firsts=[4]), "full from positions .4."),
        (lambda s: header(s, value_firsts=["x"]), "it counts"),
        (lambda s: header(s, lengths=[9999]), "9999 tokens"),
        (lambda s: setting(s, key_bits=9), "key_bits must be between 2 and 8"),
        (lambda s: setting(s, key_widths=[["44", "43"]]), "key_widths must be widths"),
        (lambda s: setting(s, key_widths=[["4" * 16] * 2]), "2 kv heads of 16 channels"),
        (lambda s: setting(s, key_widths=[["4" * 32, "3" * 32]]), "key_widths must be widths"),
        # As many rows as before, but of other heads: words are of this size, and mean others.
        (lambda s: setting(s, key_widths=[["4" * 32, "4" * 16]]), "key_widths must be widths"),
        (lambda s: setting(s, key_widths=[["4" * 32] * 2]), "words do not fit"),
        (lambda s: setting(s, key_widths=None), "words do not fit"),
        (lambda s: setting(s, value_widths=[[3, 3]]), "saved values do not fit"),
        (lambda s: setting(s, value_widths=[[3, 6, 3]]), "value_widths are of 3 kv heads"),
        (lambda s: setting(s, value_format="plain", value_bits=16, value_widths=None), "9 parts"),
        (lambda s: s[:-1], "8 parts"),
        (lambda s: replaced(s, 5, s[5][:, :, :1]), "saved values do not fit"),
        (lambda s: replaced(s, 1, s[1].astype(mx.float32)), "near do not fit"),
        (lambda s: replaced(s, 4, s[4][:, :, :8]), "saved values do not fit"),
        (lambda s: replaced(s, 3, s[3].astype(mx.float16)), "saved values do not fit"),
        (lambda s: replaced(s, 2, s[2][..., :1]), "saved values do not fit"),
        (lambda s: replaced(s, 6, s[6][:, :, :1]), "words do not fit"),
        (lambda s: replaced(s, 6, s[6].astype(mx.int32)), "words do not fit"),
        (lambda s: replaced(s, 7, None), "lacks one of its buffers"),
        (lambda s: replaced(s, 7, s[7][:, :, :1]), "grid do not fit"),
        (lambda s: replaced(s, 8, None), "sinks do not fit"),
    ],
)
def test_a_damaged_state_is_refused(break_it, message):
    with pytest.raises(ValueError, match=message):
        DeltaKVCache.from_state(break_it(fed_cache().state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"key_format": "code"},
            "key_format must be one of 'held', 'codes', 'deltas' but got 'code'",
        ),
        ({"value_format": 4}, "value_format must be one of"),
        ({"key_format": "codes"}, "key_bits must be between 2 and 8, with key_format='codes'"),
        ({"key_format": "codes", "key_bits": 16}, "between 2 and 8, .* but got 16"),
        ({"key_format": "codes", "key_bits": "4"}, "between 2 and 8, .* but got '4'"),
        ({"value_format": "rotated", "key_bits": 4}, "value_bits must be between 2 and 8"),
        ({"key_bits": 4, "key_widths": (("8" * 32,),)}, "key_widths must be widths of codes"),
        ({"key_format": "codes", "key_bits": 4, "key_widths": (("45",),)}, "must be widths"),
        ({"key_format": "codes", "key_bits": 4, "key_widths": (("44442222" * 2,),)}, "must be wid"),
        ({"key_format": "codes", "key_bits": 4, "key_widths": ((44444444,),)}, "must be widths"),
        ({"key_format": "codes", "key_bits": 4, "block_size": 20, "window": 0}, "multiple of 8"),
    ],
)
def test_settings_that_can_not_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig(**changes)


def test_heads_that_make_no_groups_are_refused():
    cache = DeltaKVCache(ROTATED)
    with pytest.raises(ValueError, match="a head_dim that is a multiple of 32 but got 48"):
        cache.update(mx.zeros((1, 2, 9, 48)), mx.zeros((1, 2, 9, 48)))
    assert cache.empty()
