"""A GGUF file's names and settings in Hugging Face's terms: tensor names, config.json.

Keys and their defaults: src/llama-model.cpp and gguf-py/gguf/constants.py in
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from .architecture import Architecture, read_architecture
from .errors import ConvertError
from .gguf_header import GGUFTensor
from .gguf_tokenizer import special_ids
from .weights import check_finite

# llama.cpp's architectures and the model_type of the same function. Its "bitnet" is the older
# 1bitLLM model with SiLU, which mlx-lm's BitNet does not compute.
ARCHITECTURES = {
    "llama": "llama",
    "bitnet-b1.58": "bitnet",
    "bitnet-25": "bitnet",
    "gemma3": "gemma3_text",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "bitnet": "BitNetForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
GEMMA_NAMES = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
# The only model whose attention is not scaled by the head's length (llama.cpp tells it so, too).
GEMMA_27B_LAYERS = 62


def rename(name: str, where: str, architecture: str = "llama") -> str:
    """A tensor's name in Hugging Face's terms.

    Raises:
        ConvertError: It is none that these models have.
    """
    base, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", base)
    names = LAYER_NAMES | (GEMMA_NAMES if architecture == "gemma3" else {})
    new = None
    if layer and layer[2] in names:
        new = f"model.layers.{int(layer[1])}.{names[layer[2]]}"
    elif base in GLOBAL_NAMES:
        new = GLOBAL_NAMES[base]
    if new is None or kind not in ("weight", "bias"):
        raise ConvertError(
            f"{where} holds {name[:80]!r}, which models of the kind {architecture} do not have."
        )
    return f"{new}.{kind}"


def read_architecture_name(metadata: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        ConvertError: It has no converter.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConvertError(
            f"{where} has the architecture {str(name)[:40]!r}; converters exist for "
            f"{', '.join(ARCHITECTURES)}."
        )
    return name


def read_config(
    metadata: dict[str, Any],
    tensors: dict[str, GGUFTensor],
    factors: GGUFTensor | None,
    where: str,
) -> dict[str, Any]:
    """A config.json from the metadata.

    Raises:
        ConvertError: The architecture has no converter, or a value is missing or wrong.
    """
    name = read_architecture_name(metadata, where)

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{name}.{key}", default)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            return value[0]  # the same for every layer
        return value

    if get("expert_count"):
        raise ConvertError(f"{where} is a mixture of experts; try mlx_lm.convert on the original.")
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConvertError(f"{where} lacks token_embd.weight.")
    model_type = ARCHITECTURES[name]
    config: dict[str, Any] = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "head_dim": get("attention.key_length"),
        # float32 in the file: the shortest decimal that gives it is what config.json had.
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": get("context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
        "rope_theta": _decimal(get("rope.freq_base", 10000.0)),
    }
    if name == "gemma3":
        config |= _gemma_config(get, config)
    ids = special_ids(metadata, embedding.shape[0])
    config |= {
        f"{token}_token_id": ids[token] for token in ("bos", "eos") if ids[token] is not None
    }
    arch = read_architecture(config, where)
    if get("rope.dimension_count", arch.head_dim) != arch.head_dim:
        raise ConvertError(
            f"{where} rotates {str(get('rope.dimension_count'))[:20]} of {arch.head_dim} dims."
        )
    if get("attention.value_length", arch.head_dim) != arch.head_dim:
        raise ConvertError(f"{where} has values of another length than keys; not supported.")
    config["rope_scaling"] = read_rope_scaling(metadata, name, arch, where)
    if factors is not None:
        config["rope_scaling"] = find_llama3(factors, arch, where)
    return config


def read_rope_scaling(
    metadata: dict[str, Any], name: str, arch: Architecture, where: str
) -> dict[str, Any] | None:
    """config.json's ``rope_scaling`` from the metadata; ``None`` without scaling.

    As llama.cpp: the type is linear where only a factor is named, and older files call that one
    ``rope.scale_linear``.

    Raises:
        ConvertError: It is of a kind that config.json can't say.
    """
    prefix = f"{name}.rope.scaling."
    values = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and value is not None
    }
    factor = values.get("factor", metadata.get(f"{name}.rope.scale_linear", 0.0))
    kind = values.get("type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind not in ("linear", "yarn"):
        raise ConvertError(f"{where} has rope scaling {str(kind)[:40]!r}; not supported.")
    other = set(values) - {"type", "factor", "original_context_length", "finetuned"}
    if other:
        raise ConvertError(f"{where} has {prefix}{min(other)[:40]}, which is not supported.")
    scaling = {"rope_type": kind, "factor": _decimal(factor)}
    original = values.get("original_context_length")
    if original or kind == "yarn":
        scaling["original_max_position_embeddings"] = original or arch.positions
    return scaling


def _gemma_config(get: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What only Gemma 3 has; what its files leave out is the same for all of its models."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config["head_dim"] or 256
    scalar = head_dim
    if config["num_hidden_layers"] == GEMMA_27B_LAYERS and isinstance(hidden, int):
        scalar = hidden // heads if isinstance(heads, int) and heads > 0 else head_dim
    return {
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": get("attention.sliding_window"),
        "sliding_window_pattern": get("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": get("final_logit_softcapping"),
        "rope_theta": _decimal(get("rope.freq_base", 1000000.0)),
        "rope_local_base_freq": _decimal(get("rope.freq_base_swa", 10000.0)),
    }


def _decimal(value: Any) -> Any:
    """The shortest decimal number that is this float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def llama3_factors(
    arch: Architecture, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What Llama 3's rope scaling divides each frequency by, as llama.cpp stores it."""
    dims = np.arange(0, arch.head_dim, 2) / arch.head_dim
    wavelengths = 2 * math.pi * arch.rope["rope_theta"] ** dims
    smooth = (original / wavelengths - low) / (high - low)
    return np.where(
        wavelengths < original / high,
        1.0,
        np.where(wavelengths > original / low, factor, 1 / ((1 - smooth) / factor + smooth)),
    )


def find_llama3(tensor: GGUFTensor, arch: Architecture, where: str) -> dict[str, Any]:
    """The rope settings that ``rope_freqs.weight`` was made from.

    Raises:
        ConvertError: It does not come from Llama 3's formula with the usual settings.
    """
    if tensor.type != "F32" or tensor.shape != (arch.head_dim // 2,):
        raise ConvertError(f"{where}: {ROPE_FACTORS} is {tensor.type} {list(tensor.shape)}.")
    values = tensor.read_bytes(0, tensor.nbytes).view(np.float32)
    check_finite(values, "F32", ROPE_FACTORS)
    factor = _decimal(float(values.max()))
    for original in (8192, 4096, 2048, 16384, 32768, 1024, 512):
        if not factor > 1:
            break
        expected = llama3_factors(arch, factor, 1.0, 4.0, original)
        if np.allclose(values, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise ConvertError(
        f"{where}: {ROPE_FACTORS} is not one of Llama 3's rope scalings; convert the original."
    )
