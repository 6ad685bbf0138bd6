"""Bytes and multiply-accumulates of a decoded token, against counts by hand."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache

from mlx_delta import DeltaConfig, load, measure_sparsity
from mlx_delta.measure.operations import count_operations, decode_operations
from mlx_delta.measure.settings import parse_setting
from mlx_delta.measure.traffic import (
    decode_traffic,
    projection_macs,
    weight_bytes,
)
from tests.tiny import SMALL, bitnet_model, llama_model, tokens

# tests/tiny.py's Llama: 3 layers, hidden 32, 4 heads of 16 and 2 kv heads, MLP of 48.
ATTENTION = 32 * 64 + 2 * 32 * 32 + 64 * 32
LAYER = ATTENTION + 3 * 32 * 48
HEAD = 4096 * 32


def filled(model, name: str, length: int, delta: DeltaConfig = SMALL, decoded: int = 1):
    """Caches of a setting with ``length`` random tokens, the last ones decoded one by one."""
    setting = parse_setting(name, delta)
    caches = setting.make_caches(model, length)
    ids = tokens(length)[0].tolist()
    if length > decoded:
        setting.prefill(model, ids[: length - decoded], caches)
    for token in ids[length - decoded :]:
        setting.forward(model, [token], caches)
    return caches


# Weights.


def test_a_tied_head_is_read_once_and_multiplied():
    model = llama_model()
    assert projection_macs(model) == 3 * LAYER + HEAD
    # float32 here, counted at 16 bits; 7 norms of 32.
    assert weight_bytes(model) == 2 * (3 * LAYER + HEAD + 7 * 32)


def test_of_an_untied_embedding_one_row_is_read():
    model = llama_model(tie_word_embeddings=False)
    assert projection_macs(model) == 3 * LAYER + HEAD
    assert weight_bytes(model) == 2 * (3 * LAYER + HEAD + 7 * 32 + 32)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_weights_count_as_stored(tied):
    model = llama_model(intermediate_size=64, tie_word_embeddings=tied)
    nn.quantize(model, group_size=32, bits=4)
    model.set_dtype(mx.float32)
    products = 3 * (ATTENTION + 3 * 32 * 64) + HEAD
    assert projection_macs(model) == products
    codes, scales = products // 2, 2 * 2 * products // 32
    row = 0 if tied else 32 // 2 + 2 * 2
    assert weight_bytes(model) == codes + scales + 2 * 7 * 32 + row


def test_weights_keep_their_type_where_there_is_a_gpu(monkeypatch):
    model = llama_model()
    monkeypatch.setattr("mlx.core.default_device", lambda: mx.Device(mx.gpu))
    assert weight_bytes(model) == 4 * (3 * LAYER + HEAD + 7 * 32)


def test_ternary_layers_read_two_bits_a_weight_and_one_scale():
    model = bitnet_model()
    # 3 layers: q and o 32 x 32, k and v 16 x 32, three of 32 x 64; sub-norms of 32 and 64.
    ternary = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    norms = 3 * (32 + 32 + 32 + 64) + 32
    assert projection_macs(model) == ternary + HEAD
    assert weight_bytes(model) == ternary // 4 + 3 * 7 * 2 + 2 * (HEAD + norms)
    # Through MLX's product: a scale and a bias to every group of 32 or 64.
    more = weight_bytes(model, ternary_kernel=False) - weight_bytes(model)
    groups = 3 * (2 * 32 + 2 * 16 + 2 * 64 + 32)
    assert more == 2 * 2 * groups - 3 * 7 * 2


# Caches.


@pytest.mark.parametrize("length", [1, 31, 100])
@pytest.mark.parametrize(
    ("name", "per_token", "most"),
    [
        ("dense", 2 * 64 * 2, None),
        ("delta", 2 * 64 * 2, None),
        ("paper", 2 * 64 * 2, None),
        ("kv8", 2 * (64 + 4), None),  # codes, and a scale and bias to 64 of them
        ("kv4", 2 * (32 + 4), None),
        ("rotating:48", 2 * 64 * 2, 48),
        ("delta:value_bits=16", 2 * 64 * 2, None),
    ],
)
def test_bytes_and_products_of_a_cache(name, per_token, most, length):
    model = llama_model(head_dim=64)
    traffic = decode_traffic(model, filled(model, name, length))
    seen = min(length, most or length)
    assert traffic.cache_bytes == 3 * 2 * per_token * seen  # layers, kv heads
    assert traffic.attention_macs == 3 * 4 * (64 + 64) * seen
    assert traffic.bytes == traffic.cache_bytes + traffic.weight_bytes


def test_quantized_caches_are_mlx_lms():
    model = llama_model(head_dim=64)
    assert all(type(cache) is QuantizedKVCache for cache in filled(model, "kv8", 20))


def test_window_only_reads_what_is_seen():
    model = llama_model()
    # Position 99 is in block 12; blocks 0 to 9 are far, of which 3 sinks are seen.
    traffic = decode_traffic(model, filled(model, "window-only", 100))
    assert traffic.attention_macs == 3 * 4 * 32 * (20 + 3)
    assert traffic.cache_bytes == 3 * 2 * 2 * 16 * 2 * (20 + 3)
    assert traffic.skippable_macs == 0


@pytest.mark.parametrize(("length", "decoded"), [(100, 1), (97, 12), (20, 3)])
def test_held_keys_read_words_offsets_grids_sequences_and_what_is_near(length, decoded):
    model = llama_model()
    delta = SMALL.changed(level=0.3, key_bits=4, value_bits=16)
    caches = filled(model, "delta", length, delta, decoded)
    expected = 0
    for cache in caches:
        far = max(0, (length - 1) // 8 - 2)
        # header, near, values, payload, counts, low, steps, zeros, sequence, sinks
        words = int(np.array(cache.state[4])[0, :, :far].sum())
        grids = 2 * 16 * (2 + 1) * far
        sinks = 2 * 3 * 16 * 2 if far else 0
        sequences = 2 * 8 * far
        near = 2 * 16 * 2 * (length - 8 * far)
        expected += 4 * words + grids + sequences + sinks + 4 * 2 * far + near
        expected += 2 * 16 * 2 * length  # values
    assert decode_traffic(model, caches).cache_bytes == expected


@pytest.mark.parametrize("name", ["delta", "delta:level=1,key_bits=4", "paper:threshold=1.0"])
def test_skippable_products_are_the_sparsity_of_the_last_query(name):
    model = llama_model()
    traffic = decode_traffic(model, caches := filled(model, name, 90))
    sparsity = measure_sparsity(caches, prompt_tokens=89).decode
    assert sparsity > 0.05
    assert traffic.skippable_macs == round(sparsity * 90 * 16 * 4 * 3)
    assert traffic.macs == 3 * LAYER + HEAD + 3 * 4 * 32 * 90 - traffic.skippable_macs
    assert traffic.to_dict()["macs"] == traffic.macs


def test_the_demo_model_by_hand():
    model, _ = load("demo")
    traffic = decode_traffic(model, filled(model, "kv4", 70))
    # 6 layers: hidden 384, 6 heads of 64 and 2 kv heads, MLP of 1,024; 4,096 tied tokens.
    layer = 384 * 384 + 2 * 384 * 128 + 384 * 384 + 3 * 384 * 1024
    products = 6 * layer + 4096 * 384
    assert traffic.projection_macs == products == 11_010_048
    # 8 bits, a scale and a bias of 16 bits per 64 weights, and the 13 norms.
    assert traffic.weight_bytes == products * 17 // 16 + 2 * 13 * 384 == 11_708_160
    assert traffic.attention_macs == 6 * 6 * 128 * 70
    assert traffic.cache_bytes == 6 * 2 * 2 * 36 * 70


# Operations.


def test_operations_are_counted_without_views_and_what_is_evaluated():
    x = mx.arange(6) + 1
    mx.eval(x)
    y = (x * 2).reshape(2, 3).transpose(1, 0)
    assert count_operations(y) == 1
    assert count_operations(y.sum() + 1) == 3
    assert count_operations(x) == 0


def test_a_token_whose_block_is_encoded_is_counted_with_what_encodes_it():
    model = llama_model()
    # Blocks of 8: one is encoded in any eight tokens.
    *others, most = sorted(decode_operations(model, filled(model, "delta", 96), 8))
    assert len(set(others)) == 1 < others[0] < most
    assert most in decode_operations(model, filled(model, "delta", 100), 8)


def test_a_dense_token_takes_fewest_operations_and_none_more_than_others():
    model = llama_model()
    dense = decode_operations(model, caches := filled(model, "dense", 60), 3)
    assert caches[0].offset == 63 and len(set(dense)) == 1
    assert dense[0] <= min(decode_operations(model, filled(model, "delta", 96), 8))
    evaluate = mx.eval
    decode_operations(model, caches, 1)
    assert mx.eval is evaluate


def test_what_is_evaluated_on_the_way_is_counted_too():
    class Impatient(nn.Module):
        def __call__(self, x: mx.array, cache: list) -> mx.array:
            half = x + 1
            mx.eval(half)
            mx.async_eval({"more": [other := half * 2]})
            np.asarray(other - 3)
            return other + 3

    class Nothing:
        state = ()

    assert decode_operations(Impatient(), [Nothing()], 2) == [4, 4]
