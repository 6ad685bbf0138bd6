"""Quantized layers that multiply in float32 give what their values give, and stay quantized."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_delta import load
from mlx_delta.loading import has_gpu
from mlx_delta.measure.traffic import projection_macs, weight_bytes
from mlx_delta.models.float_layers import (
    FloatProductEmbedding,
    FloatProductLinear,
    use_float_products,
)
from mlx_delta.ops.float_weights import CHUNK, LEAST_ROWS, Packing, dequantize
from tests.tiny import LLAMA, SMALL, llama_model, tokens, write_checkpoint

SIZES = {"hidden_size": 64, "intermediate_size": 96}
ROOM = 1 << 40


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def quantized_llama(bits=4, group_size=32, **changes):
    model = llama_model(SMALL, **{**SIZES, **changes})
    nn.quantize(model, group_size=group_size, bits=bits)
    return model


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "per call"])
@pytest.mark.parametrize("rows", [1, 2, LEAST_ROWS, 70])
def test_a_product_is_that_of_the_values(mode, kept, rows):
    group_size, bits = {"affine": (32, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[
        mode
    ]
    layer = nn.QuantizedLinear(96, 40, True, group_size, bits, mode)
    layer.bias = random(40, seed=1)
    values = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), group_size, bits, mode)
    values = values.astype(mx.float32)
    x = random(2, rows, 96, seed=2)
    expected = np.array(x, np.float64) @ np.array(values, np.float64).T + np.array(layer.bias)
    model = nn.Sequential(layer)
    use_float_products(model, ROOM if kept else 0)
    assert type(layer) is FloatProductLinear
    assert (layer._kept is not None) == kept
    np.testing.assert_allclose(model(x), expected, atol=2e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_values_are_those_of_mlx_with_their_products_in_float32(bits):
    packed = mx.quantize(random(24, 128), 64, bits)
    values = dequantize(*packed, Packing(64, bits))
    np.testing.assert_allclose(values, mx.dequantize(*packed, 64, bits), atol=1e-6)
    half = (packed[0], packed[1].astype(mx.float16), packed[2].astype(mx.float16))
    codes = dequantize(packed[0], mx.ones((24, 2)), mx.zeros((24, 2)), Packing(64, bits))
    by_hand = np.array(codes).reshape(24, 2, 64) * np.array(half[1], np.float32)[..., None]
    by_hand += np.array(half[2], np.float32)[..., None]
    np.testing.assert_allclose(dequantize(*half, Packing(64, bits)), by_hand.reshape(24, 128), 1e-6)


def test_pieces_join_to_the_whole():
    """More weights than are written out at once, and a last piece that is smaller."""
    inputs = 1024
    layer = nn.QuantizedLinear(inputs, CHUNK // inputs * 2 + 40, False, 64, 4)
    values = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4)
    x = random(9, inputs)
    use_float_products(nn.Sequential(layer))
    np.testing.assert_allclose(layer(x), np.array(x) @ np.array(values).T, atol=1e-4)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "per call"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_a_model_gives_the_logits_of_its_values(kept, tied):
    plain = llama_model(SMALL, **SIZES, tie_word_embeddings=tied)
    model = quantized_llama(tie_word_embeddings=tied)
    for (_, layer), (_, twin) in zip(
        sorted(model.named_modules(), key=lambda x: x[0]),
        sorted(plain.named_modules(), key=lambda x: x[0]),
        strict=True,
    ):
        if "scales" in layer:
            twin.weight = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4)
    use_float_products(model, ROOM if kept else 0)
    assert isinstance(model.model.embed_tokens, FloatProductEmbedding)
    for length in (1, 3, 50):
        np.testing.assert_allclose(model(tokens(length)), plain(tokens(length)), atol=2e-3)


def test_parameters_and_counts_are_those_of_the_quantized_model():
    model, plain = quantized_llama(), quantized_llama()
    use_float_products(model, ROOM)
    shapes = [
        {name: (w.shape, w.dtype) for name, w in tree_flatten(m.parameters())}
        for m in (model, plain)
    ]
    assert shapes[0] == shapes[1]
    assert weight_bytes(model) == weight_bytes(plain)
    assert projection_macs(model) == projection_macs(plain)


def test_values_out_of_date_are_not_used():
    layer = nn.QuantizedLinear(64, 32, False, 32, 4)
    use_float_products(nn.Sequential(layer), ROOM)
    x = random(3, 64)
    first = layer(x)
    layer.scales = layer.scales * 2
    layer.biases = layer.biases * 2
    np.testing.assert_allclose(layer(x), first * 2, atol=1e-4)


def test_values_are_kept_for_all_layers_or_none():
    model = quantized_llama()
    layers = [m for m in model.modules() if "scales" in m]
    use_float_products(model, sum(m.weight.size * 32 // 4 * 4 for m in layers) - 1)
    assert all(m._kept is None for m in layers)
    use_float_products(model, sum(m.weight.size * 32 // 4 * 4 for m in layers))
    assert all(m._kept is not None for m in layers)


def test_lora_layers_stand_around_them():
    model = quantized_llama()
    use_float_products(model, ROOM)
    before = model(tokens(20))
    linear_to_lora_layers(model, 3, {"rank": 2, "scale": 5.0, "dropout": 0.0})
    model.eval()
    np.testing.assert_allclose(model(tokens(20)), before, atol=1e-5)


@pytest.mark.skipif(has_gpu(), reason="a GPU multiplies quantized weights itself")
def test_loading_keeps_values_where_memory_allows(tmp_path, monkeypatch):
    weights = dict(tree_flatten(quantized_llama().parameters()))
    config = {**LLAMA, **SIZES, "quantization": {"group_size": 32, "bits": 4}}
    path = write_checkpoint(tmp_path / "model", config, weights)
    kept = load(path, SMALL)[0]
    assert kept.layers[0].mlp.up_proj._kept is not None
    monkeypatch.setattr("mlx_delta.loading.free_memory", lambda: (10_000, "this machine's memory"))
    lean = load(path, SMALL)[0]
    assert lean.layers[0].mlp.up_proj._kept is None
    np.testing.assert_allclose(kept(tokens(40)), lean(tokens(40)), atol=2e-3)
