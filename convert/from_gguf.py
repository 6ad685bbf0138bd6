"""GGUF files of llama.cpp and bitnet.cpp: weights, settings and, where possible, the tokenizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .architecture import Architecture, read_architecture
from .errors import ConvertError
from .from_safetensors import to_mlx
from .gguf_blocks import AFFINE, TERNARY, affine_rows, float_rows, i2s_codes, ternary_rows
from .gguf_header import GGUFTensor, read_header
from .gguf_tokenizer import read_gguf_tokenizer
from .weights import Affine, Source, Ternary, Weight, check_finite, check_tensors

# llama.cpp's architectures and the model_type of the same function. Its "bitnet" is the older
# 1bitLLM model with SiLU, which mlx-lm's BitNet does not compute.
ARCHITECTURES = {"llama": "llama", "bitnet-b1.58": "bitnet", "bitnet-25": "bitnet"}
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
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
ROPE_FACTORS = "rope_freqs.weight"


def read_gguf(file: Path, i2s_layout: str = "x86") -> Source:
    """Read a GGUF file as far as its header.

    Args:
        file: The file.
        i2s_layout: ``x86`` or ``arm``, for I2_S tensors.

    Raises:
        ConvertError: It is broken or not supported.
    """
    metadata, tensors = read_header(file)
    if metadata.get("split.count") not in (None, 0, 1):
        raise ConvertError(f"{file} is one of several parts; merge them with llama-gguf-split.")
    factors = tensors.pop(ROPE_FACTORS, None)
    named = {rename(name, str(file)): tensor for name, tensor in tensors.items()}
    config = read_config(metadata, named, factors, str(file))
    arch = read_architecture(config, str(file), "lm_head.weight" in named)
    check_tensors({name: t.shape for name, t in named.items()}, arch.tensors(), str(file))
    permuted = metadata["general.architecture"] == "llama"
    weights = {
        name: _weight(name, named[name], arch, permuted, i2s_layout) for name in arch.tensors()
    }
    source = Source(
        file.name.removesuffix(".gguf"),
        "gguf",
        config,
        arch,
        weights,
        "BF16" if arch.model_type == "bitnet" else _dtype(named),
        inputs=[file],
    )
    types = sorted({tensor.type for tensor in named.values()})
    lossy = [kind for kind in types if kind not in (*AFFINE, *TERNARY, *FLOATS)]
    if lossy:
        source.notes.append(
            f"{', '.join(lossy)}: no exact counterpart in MLX; read back and quantized anew, see "
            "the errors in the report"
        )
    if "I2_S" in types:
        source.notes.append(
            f"I2_S read in the {i2s_layout} layout; files made on ARM differ and carry no mark: "
            "compare the result's text, or convert the safetensors version"
        )
    source.files, note = read_gguf_tokenizer(metadata, arch.vocab, str(file))
    if note:
        source.notes.append(note)
    return source


def rename(name: str, where: str) -> str:
    """A tensor's name in Hugging Face's terms.

    Raises:
        ConvertError: It is none that these models have.
    """
    base, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", base)
    new = None
    if layer and layer[2] in LAYER_NAMES:
        new = f"model.layers.{int(layer[1])}.{LAYER_NAMES[layer[2]]}"
    elif base in GLOBAL_NAMES:
        new = GLOBAL_NAMES[base]
    if new is None or kind not in ("weight", "bias"):
        raise ConvertError(f"{where} holds {name[:80]!r}, which Llama and BitNet do not have.")
    return f"{new}.{kind}"


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
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConvertError(
            f"{where} has the architecture {str(name)[:40]!r}; converters exist for "
            f"{', '.join(ARCHITECTURES)}."
        )

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{name}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            return value[0]  # the same for every layer
        return value

    if get("expert_count"):
        raise ConvertError(f"{where} is a mixture of experts; try mlx_lm.convert on the original.")
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConvertError(f"{where} lacks token_embd.weight.")
    epsilon = get("attention.layer_norm_rms_epsilon")
    config: dict[str, Any] = {
        "architectures": [
            "BitNetForCausalLM" if ARCHITECTURES[name] == "bitnet" else "LlamaForCausalLM"
        ],
        "model_type": ARCHITECTURES[name],
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "head_dim": get("attention.key_length"),
        # float32 in the file: the shortest decimal that gives it is what config.json had.
        "rms_norm_eps": _decimal(epsilon),
        "max_position_embeddings": get("context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
        "rope_theta": _decimal(get("rope.freq_base", 10000.0)),
    }
    for key, token in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        value = metadata.get(f"tokenizer.ggml.{token}_token_id")
        if isinstance(value, int):
            config[key] = value
    arch = read_architecture({**config, "rope_scaling": None}, where)
    if get("rope.dimension_count", arch.head_dim) != arch.head_dim:
        raise ConvertError(
            f"{where} rotates {get('rope.dimension_count')} of {arch.head_dim} dims."
        )
    if get("attention.value_length", arch.head_dim) != arch.head_dim:
        raise ConvertError(f"{where} has values of another length than keys; not supported.")
    kind = get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": _decimal(get("rope.scaling.factor"))}
        if get("rope.scaling.original_context_length"):
            scaling["original_max_position_embeddings"] = get(
                "rope.scaling.original_context_length"
            )
        config["rope_scaling"] = scaling
    elif kind != "none":
        raise ConvertError(f"{where} has rope scaling {str(kind)[:40]!r}; not supported.")
    if factors is not None:
        config["rope_scaling"] = find_llama3(factors, arch, where)
    return config


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


def _dtype(tensors: dict[str, GGUFTensor]) -> str:
    """float16 where there are scales in it, else the type of most bytes."""
    totals = dict.fromkeys(FLOATS, 0)
    for tensor in tensors.values():
        if tensor.type not in FLOATS:
            return "F16"
        totals[tensor.type] += tensor.nbytes
    return max(totals, key=lambda kind: totals[kind])


def _weight(
    name: str, tensor: GGUFTensor, arch: Architecture, permuted: bool, i2s_layout: str
) -> Weight:
    """A tensor, with its rows in Hugging Face's order."""
    heads = 0
    if permuted and ".self_attn.q_proj." in name:
        heads = arch.heads
    elif permuted and ".self_attn.k_proj." in name:
        heads = arch.kv_heads
    multiple = arch.head_dim if heads else 1
    kind = tensor.type
    if kind == "I2_S":
        return _i2s(name, tensor, i2s_layout, bool(heads), multiple)

    def rows(start: int, stop: int) -> np.ndarray:
        if len(tensor.shape) == 1:
            item = tensor.row_bytes // tensor.shape[0]
            data = tensor.read_bytes(start * item, (stop - start) * item).reshape(-1, item)
        else:
            data = tensor.read_rows(start, stop)
        return unpermute(data, multiple) if heads else data

    def floats(start: int, stop: int) -> mx.array:
        data = rows(start, stop)
        values = data.view(FLOATS[kind])
        check_finite(values, kind, name)
        return to_mlx(values.reshape(-1) if len(tensor.shape) == 1 else values, kind)

    def affine(start: int, stop: int) -> Affine:
        return affine_rows(rows(start, stop), kind, name)

    def ternary(start: int, stop: int) -> Ternary:
        return ternary_rows(rows(start, stop), kind, name)

    def other(start: int, stop: int) -> mx.array:
        return mx.array(float_rows(rows(start, stop), kind, name))

    if len(tensor.shape) == 1 and kind not in FLOATS:
        raise ConvertError(f"{tensor.file}: {name} is a vector of type {kind}; expected F32.")
    read: Callable[[int, int], Any] = other
    if kind in FLOATS:
        read = floats
    elif kind in AFFINE:
        read = affine
    elif kind in TERNARY:
        read = ternary
    bits, group_size = AFFINE.get(kind, (0, 0))
    return Weight(
        name,
        tensor.shape,
        "affine" if kind in AFFINE else "ternary" if kind in TERNARY else "float",
        kind,
        tensor.nbytes,
        read,
        row_multiple=multiple,
        group_size=group_size,
        bits=bits,
        lossy=kind not in (*FLOATS, *AFFINE, *TERNARY),
    )


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads in Hugging Face's order.

    llama.cpp's converter interleaves the two halves of each head for its rope
    (``LlamaModel.permute`` in convert_hf_to_gguf.py); this undoes it.
    """
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _i2s(name: str, tensor: GGUFTensor, layout: str, heads: bool, multiple: int) -> Weight:
    """Microsoft's ternary format: one scale for the tensor, after the codes."""
    if len(tensor.shape) != 2 or tensor.shape[1] % 128:
        raise ConvertError(f"{tensor.file}: {name} is I2_S with rows of {tensor.shape[-1]}.")
    end = tensor.shape[0] * tensor.row_bytes
    scale = tensor.read_bytes(end, 4).view(np.float32)
    check_finite(scale, "F32", name)

    def read(start: int, stop: int) -> Ternary:
        data = tensor.read_rows(start, stop)
        codes = i2s_codes(data, tensor.shape[1], layout, name)
        return Ternary(unpermute(codes, multiple) if heads else codes, scale)

    return Weight(name, tensor.shape, "ternary", "I2_S", tensor.nbytes, read, row_multiple=multiple)
