"""A tiny random model of every architecture that mlx-lm's own tests build, and of a few more.

mlx-lm's tests hand each model that they build to one method; run with another in its place, they
only build. Their default-sized models, which they never compute much with, are built anew with
smaller numbers.
"""

import ast
import copy
import importlib
import unittest
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from tests.peers.upstream import fetch_tests, import_tests

RUNNER = "model_test_runner"
ALL = "test_all_models"
VOCABULARY = 256  # where a model has a larger one

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
# Numbers that are lowered wherever they are larger.
LIMITS = {
    ("vocab_size", "num_vocab"): VOCABULARY,
    ("hidden_size",): 128,
    ("intermediate_size",): 256,
}
SMALL_HEADS = {"n_embd": 64, "n_layer": 4, "n_head": 4}

# What to change in configurations that are as large as real ones, by mlx-lm's name of the file.
SMALLER: dict[str, dict[str, Any]] = {
    "afm7": {"num_layers": 8, "num_hidden_layers": 8, "num_kv_reuse_layers": 4},
    "cohere": SMALL,
    "cohere2": {**SMALL, "head_dim": 16},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma3_text": {"num_hidden_layers": 6},
    "gpt2": SMALL_HEADS,
    "gpt_neox": SMALL,
    "gptj": {**SMALL_HEADS, "n_inner": 128, "rotary_dim": 8},
    "gpt_oss": {"hidden_size": 64, "num_local_experts": 4, "intermediate_size": 64},
    "falcon_h1": {
        "num_hidden_layers": 4,
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
    },
    "jamba": {"mamba_expand": 2, "mamba_d_state": 16},
    "lfm2": {"block_dim": 128},
    "lfm2_moe": {"moe_intermediate_size": 64},
    "nanochat": {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4},
    "openelm": {"model_dim": 128},
    "phi": {**SMALL, "num_key_value_heads": 2},
    "phi3": {**SMALL, "num_key_value_heads": 2},
    "pixtral": {
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 256, **SMALL}
    },
    "qwen": {**SMALL, "kv_channels": 16},
    "qwen2_moe": {"hidden_size": 128, "moe_intermediate_size": 32},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 32},
}

# Not computed with: mlx-lm's BitNet runs on Metal only. Ours is tested by itself.
LEFT_OUT = {"bitnet"}

_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
_YARN = {"rope_theta": 1e6, "rope_type": "default", "llama_4_scaling_beta": 0.1}
_YARN["original_max_position_embeddings"] = 16

# Architectures that mlx-lm's tests do not build, or only to read their names of weights.
MORE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            **_TEXT,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
        },
        "vocab_size": VOCABULARY,
    },
    "ministral3": {
        **_TEXT,
        "rope_parameters": _YARN,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
    },
    "mistral3": {"text_config": {"model_type": "mistral", **_TEXT}},
    "mellum": {
        **_TEXT,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "qwen2_vl": {"text_config": {"model_type": "qwen2", **_TEXT}},
    "qwen3_vl": {
        "text_config": {
            "model_type": "qwen3", **_TEXT, "rope_theta": 1e4, "tie_word_embeddings": True
        }
    },
}  # fmt: skip


class _Built(Exception):
    """Ends one of mlx-lm's tests once it has built its model."""


def upstream_models() -> dict[str, nn.Module]:
    """The models that mlx-lm's tests build, by the names of its files; not computed yet.

    Raises:
        CannotFetch: mlx-lm's tests can't be fetched.
    """
    file = fetch_tests() / "test_models.py"
    module = import_tests(file)
    built: dict[str, nn.Module] = {}

    def keep(test: unittest.TestCase, model: nn.Module, *_: Any) -> None:
        built.setdefault(type(model).__module__.rpartition(".")[2], model)
        if test._testMethodName != ALL:
            raise _Built

    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        tests = getattr(module, node.name)
        setattr(tests, RUNNER, keep)
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        for method in methods:
            if method.name.startswith("test_") and RUNNER in ast.dump(method):
                try:
                    getattr(tests(method.name), method.name)()
                except (_Built, unittest.SkipTest):
                    pass
    return built


def tiny_models() -> Iterator[tuple[str, nn.Module]]:
    """Each architecture's name and a model of it, float32 and computed, one at a time.

    Raises:
        CannotFetch: mlx-lm's tests can't be fetched.
    """
    mx.random.seed(0)
    built = upstream_models()
    for name in sorted({*built, *MORE} - LEFT_OUT):
        if name in built:
            model = _smaller(name, built.pop(name))
        else:
            architecture = importlib.import_module(f"mlx_lm.models.{name}")
            config = copy.deepcopy({"model_type": name, **MORE[name]})
            model = architecture.Model(architecture.ModelArgs.from_dict(config))
        model.update(_random(model))
        model.eval()
        mx.eval(model.parameters())
        yield name, model


def _smaller(name: str, model: nn.Module) -> nn.Module:
    """The model, built again with a smaller vocabulary and what else is to be smaller."""
    args = getattr(model, "args", None) or getattr(model, "config", None)
    changes = dict(SMALLER.get(name, {}))
    for keys, most in LIMITS.items():
        for key in keys:
            if (getattr(args, key, None) or 0) > most:
                changes.setdefault(key, most)
    if not changes or name == "phi3small":  # its tokens that mean nothing are at fixed places
        return model
    args = copy.deepcopy(args)
    for key, value in changes.items():
        setattr(args, key, value)
    return type(model)(args)


def _random(model: nn.Module) -> Any:
    """Weights large enough that attention is far from uniform, in float32.

    Vectors (norms, biases, the constants of state spaces) stay as they are made.
    """
    rng = np.random.default_rng(0)

    def draw(weight: mx.array) -> mx.array:
        if not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        is_matrix = weight.ndim > 1 and min(weight.shape[-2:]) >= 8
        if not is_matrix and (weight.ndim < 2 or mx.any(weight)):
            return weight.astype(mx.float32)
        values = rng.standard_normal(weight.shape, np.float32)
        return mx.array(values * weight.shape[-1] ** -0.5)

    return tree_map(draw, model.parameters())


def size(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))
