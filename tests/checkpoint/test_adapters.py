"""Adapters of PEFT's and mlx-lm's compute what they say, or are refused by name."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_delta import load
from mlx_delta.checkpoint.adapters import apply_adapters
from tests.tiny import SMALL, llama_model, tokens, write_llama

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.1)


def pair(path, outputs, inputs, rank=4, kind="", name=""):
    return {
        f"base_model.model.{path}.lora_{kind}A{name}": random(rank, inputs, seed=1),
        f"base_model.model.{path}.lora_{kind}B{name}": random(outputs, rank, seed=2),
    }


def write_peft(path, weights, **changes):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**LORA, **changes}))
    mx.save_safetensors(str(path / "adapter_model.safetensors"), weights)
    return path


WEIGHTS = {**pair(Q, 64, 32, name=".weight"), **pair(DOWN, 32, 48, name=".weight")}


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, {Q: 2.0, DOWN: 2.0}),
        ({"use_rslora": True}, {Q: 8 / math.sqrt(4), DOWN: 8 / math.sqrt(4)}),
        ({"alpha_pattern": {"q_proj": 2}}, {Q: 0.5, DOWN: 2.0}),
        ({"lora_alpha": 3.0}, {Q: 0.75, DOWN: 0.75}),
    ],
    ids=["plain", "rank-stabilized", "alpha for a module", "another alpha"],
)
def test_pefts_lora_adds_scale_b_a_to_the_weights(tmp_path, changes, scales):
    model, merged = llama_model(SMALL), llama_model(SMALL)
    apply_adapters(model, write_peft(tmp_path / "a", WEIGHTS, **changes))
    for path, module in merged.named_modules():
        if path in scales:
            stem = f"base_model.model.{path}.lora_"
            a, b = WEIGHTS[f"{stem}A.weight"], WEIGHTS[f"{stem}B.weight"]
            module.weight = module.weight + scales[path] * (b @ a)
    got, plain = model(tokens(30)), llama_model(SMALL)(tokens(30))
    np.testing.assert_allclose(got, merged(tokens(30)), atol=1e-3)
    assert mx.abs(got - plain).max() > 0.1


@pytest.mark.parametrize("name", ["", ".weight", ".default.weight"])
def test_pefts_names_in_every_spelling(tmp_path, name):
    model = llama_model(SMALL)
    apply_adapters(model, write_peft(tmp_path / "a", pair(Q, 64, 32, name=name)))
    assert model.layers[1].self_attn.q_proj.lora_a.shape == (32, 4)


def test_pefts_lora_of_an_embedding(tmp_path):
    model, merged = llama_model(SMALL), llama_model(SMALL)
    weights = pair("model.embed_tokens", 32, 4096, kind="embedding_")
    apply_adapters(model, write_peft(tmp_path / "a", weights))
    a, b = weights.values()
    merged.model.embed_tokens.weight = merged.model.embed_tokens.weight + 2.0 * (b @ a).T
    np.testing.assert_allclose(model(tokens(30)), merged(tokens(30)), atol=1e-3)


def test_pefts_lora_on_a_quantized_model(tmp_path):
    model = llama_model(SMALL, hidden_size=64, intermediate_size=64)
    nn.quantize(model, group_size=32, bits=8)
    before = model(tokens(20))
    apply_adapters(model, write_peft(tmp_path / "a", pair(Q, 64, 64)))
    assert mx.abs(model(tokens(20)) - before).max() > 0.01


def test_loading_applies_an_adapter(tmp_path):
    path = write_llama(tmp_path / "model")
    adapter = write_peft(tmp_path / "a", WEIGHTS)
    with_it, _ = load(path, SMALL, adapter_path=adapter)
    assert mx.abs(with_it(tokens(20)) - load(path, SMALL)[0](tokens(20))).max() > 0.1


FULL = {"base_model.model.lm_head.weight": random(4096, 32)}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        (WEIGHTS, {"peft_type": "IA3"}, "is PEFT's 'IA3'; LORA is read"),
        (WEIGHTS, {"use_dora": True}, "has use_dora True, which is not read"),
        (WEIGHTS, {"bias": "all"}, "has bias 'all', which is not read"),
        (WEIGHTS, {"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        (WEIGHTS, {"lora_alpha": "x"}, "lora_alpha must be a number"),
        (WEIGHTS, {"alpha_pattern": {"(": 1}}, "alpha_pattern must hold plain names"),
        ({**WEIGHTS, **FULL}, {}, "holds tensor 'base_model.model.lm_head.weight'"),
        (pair("model.layers.9.mlp.up_proj", 48, 32), {}, "has no model.layers.9.mlp.up_proj"),
        (pair("model.norm", 32, 32), {}, "model.norm is a RMSNorm, not a linear layer"),
        (pair(Q, 63, 32), {}, r"takes A and B of shapes \(4, 32\) and \(64, 4\)"),
        (dict(list(pair(Q, 64, 32).items())[:1]), {}, "no matching A and B for"),
        ({}, {}, "has no weights"),
    ],
    ids=[
        "another method", "DoRA", "bias", "whole modules", "alpha", "pattern", "a whole head",
        "no such layer", "a norm", "shape", "half a pair", "empty",
    ],
)  # fmt: skip
def test_what_is_not_read_of_peft_is_named(tmp_path, weights, changes, message):
    adapter = write_peft(tmp_path / "a", weights or {"x": mx.zeros(1)}, **changes)
    if not weights:
        message = "holds tensor 'x'"
    with pytest.raises(ValueError, match=message):
        apply_adapters(llama_model(SMALL), adapter)


def write_mlx(path, config, weights):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    return path


PARAMETERS = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
MLX_WEIGHTS = {
    "model.layers.2.self_attn.q_proj.lora_a": random(32, 4),
    "model.layers.2.self_attn.q_proj.lora_b": random(4, 64, seed=3),
}


@pytest.mark.parametrize("entry", ["num_layers", "lora_layers"])
def test_mlx_lms_adapters_old_and_new(tmp_path, entry):
    model = llama_model(SMALL)
    before = model(tokens(20))
    config = {entry: 1, "lora_parameters": PARAMETERS}
    apply_adapters(model, write_mlx(tmp_path / "a", config, MLX_WEIGHTS))
    merged = llama_model(SMALL)
    layer = merged.layers[2].self_attn.q_proj
    a, b = MLX_WEIGHTS.values()
    layer.weight = layer.weight + 20.0 * (a @ b).T
    np.testing.assert_allclose(model(tokens(20)), merged(tokens(20)), atol=2e-3)
    assert mx.abs(model(tokens(20)) - before).max() > 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_layers": 4}, "lora_parameters must hold rank, scale and dropout"),
        ({}, "neither num_layers"),
        ({"num_layers": "x", "lora_parameters": PARAMETERS}, "num_layers must be a whole number"),
        ({"num_layers": 1, "lora_parameters": {"rank": 4, "alpha": 2}}, "scale must be a number"),
        ({"num_layers": 1, "lora_parameters": {**PARAMETERS, "rank": 0}}, "rank must be"),
        ({"num_layers": 1, "lora_parameters": {**PARAMETERS, "rank": 3}}, "does not match"),
        ({"fine_tune_type": "magic"}, "fine_tune_type must be lora, dora or full"),
    ],
    ids=["old", "empty", "layers", "alpha", "rank", "other rank", "kind"],
)
def test_what_is_wrong_with_mlx_lms_adapters_is_named(tmp_path, config, message):
    adapter = write_mlx(tmp_path / "a", config, MLX_WEIGHTS)
    with pytest.raises(ValueError, match=message) as caught:
        apply_adapters(llama_model(SMALL), adapter)
    assert "\n" not in str(caught.value)


def test_a_place_without_an_adapter_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapters.npz").write_bytes(b"x")
    for name, message in (
        ("empty", "has no adapter_config.json"),
        ("adapters.npz", "is a file; give the directory"),
        ("missing", "does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            apply_adapters(llama_model(SMALL), tmp_path / name)
