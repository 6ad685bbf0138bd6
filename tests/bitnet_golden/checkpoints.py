"""Small random BitNet checkpoints in the formats of the hub, written without the library.

NumPy and the standard library only, so that the golden outputs (``make.py``, with PyTorch) and the
tests (with MLX) get the same bytes. The numbers come straight from a bit generator, whose stream
NumPy promises to keep.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

BITNET: dict[str, Any] = {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "hidden_size": 128,
    "intermediate_size": 320,  # a multiple of 64, so that not all groups are of 128
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
LLAMA = BITNET | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "head_dim": 32,
    "tie_word_embeddings": False,
}


MICROSOFT_2B = BITNET | {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "vocab_size": 128256,
}


def quantization(**changes: Any) -> dict[str, Any]:
    """The entry of config.json that marks a BitNet."""
    return {"quantization_config": {"quant_method": "bitnet", **changes}}


AUTO = quantization(linear_class="autobitlinear", quantization_mode="offline")
DIVIDED = quantization(linear_class="bitlinear", quantization_mode="offline")
ONLINE = quantization(linear_class="autobitlinear", quantization_mode="online")

# As microsoft/bitnet-b1.58-2B-4T, its -bf16 repository, and llama-type ones: HF1BitLLM and Falcon3
# (which name no linear_class), Falcon-E.
CASES: dict[str, dict[str, Any]] = {
    "packed": BITNET | AUTO,
    "packed, divided": BITNET | DIVIDED,
    "bf16": BITNET | ONLINE,
    "llama, divided": LLAMA | quantization(modules_to_not_convert=None),
    "llama": LLAMA | AUTO,
}

Tensors = dict[str, tuple[str, np.ndarray]]  # safetensors' type and the array, by name


class Numbers:
    """Random numbers that are the same everywhere."""

    def __init__(self, seed: int):
        self._bits = np.random.PCG64(seed)

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """Float64 in [0, 1) with 24 random bits."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(40)) / float(1 << 24)).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Float32, nearly normal: twelve uniform numbers added up."""
        return (self.uniform((12, *shape)).sum(axis=0) - 6).astype(np.float32)


def bfloat16(values: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor of bfloat16, cut off below rather than rounded."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return "BF16", (bits >> np.uint32(16)).astype(np.uint16)


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes [out, in] four to a byte: bits 2k of row r hold row r + k * out / 4."""
    rows = len(codes) // 4
    packed = np.zeros((rows, codes.shape[1]), np.uint8)
    for row in range(len(codes)):
        packed[row % rows] |= codes[row].astype(np.uint8) << 2 * (row // rows)
    return packed


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of the ternary layers."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}


def tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """A checkpoint's tensors: masters in bfloat16 if quantized online, else packed."""
    numbers = Numbers(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: Tensors = {}
    method = config["quantization_config"]
    divides = method.get("linear_class", "bitlinear") == "bitlinear"
    for path, shape in linears(config).items():
        if method.get("quantization_mode") == "online":
            found[f"{path}.weight"] = bfloat16(numbers.normal(shape) * 0.05)
            continue
        codes = np.floor(numbers.uniform(shape) * 3)
        scale = 0.05 + 0.05 * numbers.uniform((1,))
        found[f"{path}.weight"] = ("U8", pack(codes))
        found[f"{path}.weight_scale"] = bfloat16(1 / scale if divides else scale)
    norms = {"model.norm": hidden}
    for i in range(config["num_hidden_layers"]):
        path = f"model.layers.{i}"
        norms |= {f"{path}.input_layernorm": hidden, f"{path}.post_attention_layernorm": hidden}
        if config["model_type"] == "bitnet":
            norms[f"{path}.self_attn.attn_sub_norm"] = hidden
            norms[f"{path}.mlp.ffn_sub_norm"] = config["intermediate_size"]
    for path, size in norms.items():
        found[f"{path}.weight"] = bfloat16(0.5 + numbers.uniform((size,)))
    found["model.embed_tokens.weight"] = bfloat16(numbers.normal((vocab, hidden)))
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = bfloat16(numbers.normal((vocab, hidden)) * 0.1)
    return found


def write(folder: Path, config: dict[str, Any], found: Tensors) -> Path:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in found.items():
        start, data = len(data), data + np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, len(data)]}
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    return folder


def write_2b(path: Path, quantized_head: bool) -> Path:
    """A checkpoint of the 2B model's shape whose tensors take no room on disk."""
    path.mkdir()
    config = MICROSOFT_2B | AUTO
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[str, list[int]]] = {"model.norm.weight": ("BF16", [hidden])}
    for name, (rows, columns) in linears(config).items():
        shapes[f"{name}.weight"] = ("U8", [rows // 4, columns])
        shapes[f"{name}.weight_scale"] = ("BF16", [1])
    for i in range(config["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm"):
            shapes[f"model.layers.{i}.{name}.weight"] = ("BF16", [hidden])
        shapes[f"model.layers.{i}.mlp.ffn_sub_norm.weight"] = ("BF16", [ffn])
    head, rows = "model.embed_tokens", config["vocab_size"]
    if quantized_head:
        config["quantization"] = {"group_size": 64, "bits": 4}
        shapes[f"{head}.weight"] = ("U32", [rows, hidden // 8])
        shapes[f"{head}.scales"] = shapes[f"{head}.biases"] = ("BF16", [rows, hidden // 64])
    else:
        shapes[f"{head}.weight"] = ("BF16", [rows, hidden])
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, size = end, {"U8": 1, "BF16": 2, "U32": 4}[dtype]
        end += size * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    (path / "config.json").write_text(json.dumps(config))
    head_bytes = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(head_bytes).to_bytes(8, "little") + head_bytes)
        file.truncate(8 + len(head_bytes) + end)
    return path


def tokens(length: int = 24) -> np.ndarray:
    """Token ids [1, length]."""
    return np.floor(Numbers(99).uniform((1, length)) * BITNET["vocab_size"]).astype(np.int64)
