"""The shapes of the small checkpoints, and their random weights.

The numbers come from ``RandomState``, whose streams numpy keeps for ever, so that logits which
transformers computed once (``make_golden.py``) stay comparable.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The shape of Llama 3.2: tied, a rope scaling, and here attention biases too.
LLAMA3 = LLAMA | {
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "max_position_embeddings": 131072,
}
BITNET: dict[str, Any] = LLAMA | {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "hidden_size": 128,
    "intermediate_size": 256,
    "hidden_act": "relu2",
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "quantization_config": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    },
}
MASTER = BITNET | {
    "quantization_config": BITNET["quantization_config"] | {"quantization_mode": "online"}
}
# The shape of Gemma 3: windows in two layers of three, norms on queries and keys.
GEMMA = {key: value for key, value in LLAMA.items() if key != "hidden_act"} | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 64,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "tie_word_embeddings": True,
}
# Falcon3-1.58 and HF1BitLLM: Llama with ternary layers whose scale divides.
TERNARY_LLAMA = LLAMA | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": None},
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, written down apart from the converter's own list."""
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", q, h),
            ("self_attn.k_proj", kv, h),
            ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, q),
            ("mlp.gate_proj", f, h),
            ("mlp.up_proj", f, h),
            ("mlp.down_proj", h, f),
        ):
            found[f"{p}{name}.weight"] = (rows, columns)
            if config.get("attention_bias") and "attn" in name:
                found[f"{p}{name}.bias"] = (rows,)
        found[p + "input_layernorm.weight"] = (h,)
        found[p + "post_attention_layernorm.weight"] = (h,)
        if config["model_type"] == "gemma3_text":
            found[p + "pre_feedforward_layernorm.weight"] = (h,)
            found[p + "post_feedforward_layernorm.weight"] = (h,)
            found[p + "self_attn.q_norm.weight"] = (d,)
            found[p + "self_attn.k_norm.weight"] = (d,)
        if config["model_type"] == "bitnet":
            found[p + "self_attn.attn_sub_norm.weight"] = (h,)
            found[p + "mlp.ffn_sub_norm.weight"] = (f,)
    found["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], h)
    return found


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights that bfloat16 holds exactly."""
    state = np.random.RandomState(seed)
    made = {}
    for name, shape in shapes(config).items():
        values = state.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            # Gemma adds the 1 itself.
            values = 0.1 * values + (config["model_type"] != "gemma3_text")
        elif len(shape) == 2:
            values *= shape[1] ** -0.5
        # Rounded to bfloat16 by cutting the lower half, so that no library's rounding matters.
        made[name] = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return made


def is_linear(name: str) -> bool:
    """Whether it is the matrix of a layer's projection."""
    return "_proj.weight" in name


def ternary(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """BitNet's rounding: values -1, 0, 1 as int8 and the scale that multiplies them."""
    mean = np.float32(max(np.abs(values).mean(dtype=np.float64), 1e-5))
    return np.clip(np.round(values / mean), -1, 1).astype(np.int8), mean
