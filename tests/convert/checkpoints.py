"""Small random checkpoints in the formats that people have, made anew by every test run.

Their shapes and numbers are those of ``shapes.py``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .shapes import (
    BITNET as BITNET,
)
from .shapes import (
    GEMMA as GEMMA,
)
from .shapes import (
    LLAMA as LLAMA,
)
from .shapes import (
    LLAMA3 as LLAMA3,
)
from .shapes import (
    LLAMA3_ROPE as LLAMA3_ROPE,
)
from .shapes import (
    MASTER as MASTER,
)
from .shapes import (
    TERNARY_LLAMA as TERNARY_LLAMA,
)
from .shapes import (
    is_linear as is_linear,
)
from .shapes import (
    shapes as shapes,
)
from .shapes import (
    ternary as ternary,
)
from .shapes import (
    weights as weights,
)

TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def to_array(values: np.ndarray, dtype: str) -> mx.array:
    """As MLX's type."""
    return mx.array(values).astype(TYPES[dtype])


def pack_rows(codes: np.ndarray) -> np.ndarray:
    """Hugging Face's packing of codes 0, 1, 2."""
    parts = np.split(codes.astype(np.uint8), 4)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def packed_weights(
    config: dict[str, Any], seed: int = 0, dtype: str = "BF16"
) -> dict[str, mx.array]:
    """A BitNet checkpoint with packed layers; the scales divide for ``bitlinear``."""
    divides = config["quantization_config"].get("linear_class", "bitlinear") == "bitlinear"
    made = {}
    for name, values in weights(config, seed).items():
        if is_linear(name):
            codes, scale = ternary(values)
            made[name] = mx.array(pack_rows(codes + 1))
            made[name + "_scale"] = to_array(np.array([1 / scale if divides else scale]), dtype)
        else:
            made[name] = to_array(values, dtype)
    return made


def write_hf(
    folder: Path,
    config: dict[str, Any],
    arrays: dict[str, mx.array],
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """A Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(arrays)
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i::shards]
            mx.save_safetensors(str(folder / file), {name: arrays[name] for name in part})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        write_tokenizer(folder, config["vocab_size"])
    return folder


def write_llama(
    folder: Path,
    config: dict[str, Any] = LLAMA,
    dtype: str = "BF16",
    shards: int = 1,
    **kwargs: Any,
) -> Path:
    """A Llama directory, or one of a BitNet's full-precision weights."""
    arrays = {name: to_array(values, dtype) for name, values in weights(config).items()}
    return write_hf(folder, {**config, "torch_dtype": DTYPE_NAMES[dtype]}, arrays, shards, **kwargs)


def write_packed(folder: Path, config: dict[str, Any] = BITNET, dtype: str = "BF16") -> Path:
    """A directory of a packed BitNet or ternary Llama."""
    config = {**config, "torch_dtype": DTYPE_NAMES[dtype]}
    return write_hf(folder, config, packed_weights(config, dtype=dtype))


DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WORDS = (
    "the a and of to in is was for on that with as his they be at one have this from or had by "
    "hot but some what there we can out other were all your when up use word how said an each"
).split()


def pieces(vocab: int) -> list[str]:
    """A vocabulary: special tokens, single signs, then words and made-up syllables."""
    signs = [chr(i) for i in range(33, 127)]
    found = ["<unk>", "<s>", "</s>", "<|eot_id|>", "▁", *signs]
    for word in WORDS:
        for end in range(2, len(word) + 1):
            found.append(word[:end])
        found.append("▁" + word[0])
        found += ["▁" + word[:end] for end in range(2, len(word) + 1)]
    found += [a + b for a in "bcdfghjklmnp" for b in "aeiou"]
    found += [a + b for a in "ABCDEFGHIJKLMNOP" for b in "aeiouy"]
    return list(dict.fromkeys(found))[:vocab]


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer.json of a real kind: BPE with a beginning and an end."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    names = pieces(vocab)
    ids = {piece: i for i, piece in enumerate(names)}
    merges = [
        (p[:k], p[k:]) for p in names for k in range(1, len(p)) if p[:k] in ids and p[k:] in ids
    ]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|eot_id|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}<s>{{ m['content'] }}<|eot_id|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# GGUF, written by hand: the gguf package's writer knows no I2_S, and refuses broken files.
GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
GGUF_TYPES |= {"Q4_K": 12, "Q6_K": 14, "TQ1_0": 34, "TQ2_0": 35, "I2_S": 36}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
GGUF_GEMMA_NAMES = GGUF_NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str = "llama") -> str:
    """llama.cpp's name of a tensor."""
    base, _, kind = name.rpartition(".")
    names = GGUF_GEMMA_NAMES if arch == "gemma3" else GGUF_NAMES
    if base.startswith("model.layers."):
        _, _, layer, rest = base.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{GGUF_NAMES[base]}.{kind}"


def gguf_string(text: str) -> bytes:
    """A string as in GGUF."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    item = gguf_value(value[0])[:4]
    body = b"".join(gguf_value(entry)[4:] for entry in value)
    return struct.pack("<I", 9) + item + struct.pack("<Q", len(value)) + body


def encode_gguf(values: np.ndarray, kind: str) -> bytes:
    """A float32 array [rows, in] in one of GGUF's types."""
    if kind == "F32":
        return values.astype("<f4").tobytes()
    if kind == "F16":
        return values.astype("<f2").tobytes()
    if kind == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    if kind == "I2_S":
        codes, scale = ternary(values)
        return encode_i2s(codes + 1, scale)
    import gguf

    if kind in ("Q4_K", "Q6_K"):  # the package only reads these: random blocks, sane scales
        state = np.random.RandomState(values.size % 1000)
        block = {"Q4_K": 144, "Q6_K": 210}[kind]
        data = state.randint(0, 256, (values.size // 256, block)).astype(np.uint8)
        scale = np.array([0.001, 0.0005], dtype="<f2").view(np.uint8)
        if kind == "Q4_K":
            data[:, :4] = scale
        else:
            data[:, -2:] = scale[:2]
        return data.tobytes()
    if kind.startswith("TQ"):
        codes, scale = ternary(values)
        values = codes * np.float32(np.float16(scale))
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).tobytes()


def encode_i2s(codes: np.ndarray, scale: np.float32, lanes: int = 32) -> bytes:
    """I2_S as bitnet.cpp writes it: ``lanes`` is 32 for x86 and 16 for ARM."""
    groups = codes.astype(np.uint8).reshape(-1, 4, lanes)
    packed = groups[:, 0] << 6 | groups[:, 1] << 4 | groups[:, 2] << 2 | groups[:, 3]
    return packed.tobytes() + struct.pack("<f", scale) + b"\0" * 28


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows (LlamaModel.permute in convert_hf_to_gguf.py)."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2)).reshape(values.shape)


def gguf_metadata(config: dict[str, Any], arch: str) -> dict[str, Any]:
    """The metadata of a model with a sentencepiece-like tokenizer."""
    names = pieces(config["vocab_size"])
    return {
        "general.architecture": arch,
        "general.name": "tiny",
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_theta"],
        f"{arch}.rope.dimension_count": config["head_dim"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(names))],
        "tokenizer.ggml.token_type": [2, 3, 3, 3] + [1] * (len(names) - 4),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_gguf(
    file: Path,
    config: dict[str, Any] = LLAMA,
    kind: str = "F16",
    arch: str = "llama",
    embedding: str = "F16",
    values: dict[str, np.ndarray] | None = None,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file: projections in ``kind``, embedding and head in ``embedding``, the rest F32."""
    tensors: list[tuple[str, tuple[int, ...], str, bytes]] = []
    for name, array in (values or weights(config)).items():
        if arch == "llama" and ".q_proj." in name:
            array = permute(array, config["num_attention_heads"])
        elif arch == "llama" and ".k_proj." in name:
            array = permute(array, config["num_key_value_heads"])
        elif arch == "gemma3" and "norm" in name:
            array = array + 1  # as llama.cpp's converter
        used = "F32"
        if array.ndim == 2:
            used = kind if is_linear(name) else embedding
        tensors.append((gguf_name(name, arch), array.shape, used, encode_gguf(array, used)))
    for name, array in (extra or {}).items():
        tensors.append((name, array.shape, "F32", encode_gguf(array, "F32")))
    values_ = metadata or gguf_metadata(config, arch)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values_))
    for key, value in values_.items():
        head += gguf_string(key) + gguf_value(value)
    offset = 0
    for name, shape, used, data in tensors:
        head += gguf_string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", GGUF_TYPES[used], offset)
        offset += -(-len(data) // 32) * 32
    body = b"".join(data + b"\0" * (-len(data) % 32) for _, _, _, data in tensors)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return file
