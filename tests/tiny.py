"""Small random models and inputs for the tests, in memory and as checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mlx_delta
from mlx_delta import DeltaConfig
from mlx_delta.models import bitnet, llama

# Small blocks, so that a few dozen tokens already reach far outside the window.
SMALL = DeltaConfig(block_size=8, window=16, sinks=3, threshold=1.0)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

BITNET = {
    **LLAMA,
    "model_type": "bitnet",
    "intermediate_size": 64,  # ternary layers take multiples of 32
    "num_attention_heads": 4,
    "head_dim": 8,  # BitNet's attention norm spans hidden_size = heads * head_dim
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
}


def smooth_keys(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random keys [..., N, D] whose neighbours along N are alike, as in a trained model."""
    steps = np.random.default_rng(seed).normal(size=shape)
    return (np.cumsum(steps, axis=-2) * 0.4).astype(np.float32)


def llama_model(delta: DeltaConfig | None = SMALL, seed: int = 0, **changes: Any) -> llama.Model:
    """A random Llama; the same weights for the same seed, whatever the setting."""
    model = llama.Model(llama.ModelArgs.from_dict({**LLAMA, "delta": delta, **changes}))
    rng = np.random.default_rng(seed)
    # Larger weights than the default: attention that depends on what it looks at.
    weights = [
        (name, mx.array(rng.normal(size=w.shape) * 0.3 if w.ndim > 1 else np.ones(w.shape)))
        for name, w in sorted(tree_flatten(model.parameters()))
    ]
    model.load_weights(weights)
    model.set_dtype(mx.float32)
    model.eval()
    mx.eval(model.parameters())
    return model


def bitnet_model(delta: DeltaConfig | None = SMALL, seed: int = 0, **changes: Any) -> bitnet.Model:
    """A random BitNet, in float32."""
    model = bitnet.Model(bitnet.ModelArgs.from_dict({**BITNET, "delta": delta, **changes}))
    model.load_weights(sorted(model.sanitize(bitnet_weights(model, seed)).items()))
    model.eval()
    mx.eval(model.parameters())
    return model


def bitnet_weights(model: Any, seed: int = 0) -> dict[str, mx.array]:
    """Random weights for a ternary model in the packed layout of microsoft/bitnet-b1.58-2B-4T."""
    rng = np.random.default_rng(seed)
    ternary = {f"{path}.weight" for path, _ in model.ternary_layers()}
    weights = {}
    for name, old in tree_flatten(model.parameters()):
        if name in ternary:
            shape = (old.shape[0] // 4, old.shape[1] * 16)
            codes = rng.integers(0, 3, (4, *shape)).astype(np.uint8)
            packed = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
            weights[name] = mx.array(packed)
            scale = rng.uniform(0.1, 0.3, 1).astype(np.float32)
            weights[f"{name}_scale"] = mx.array(scale)
        elif name.endswith("norm.weight"):
            weights[name] = mx.ones(old.shape)
        elif not name.endswith((".scales", ".biases")):
            weights[name] = mx.array(rng.normal(size=old.shape).astype(np.float32) * 0.5)
    return weights


def byte_tokenizer(path: Path) -> None:
    """Give a model directory a tokenizer of 256 pieces, one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": alphabet[1]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def copy_tokenizer(path: Path) -> None:
    """Give a model directory the demo model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        demo = Path(mlx_delta.__file__).parent / "bundled" / "demo" / name
        (path / name).write_bytes(demo.read_bytes())


def write_checkpoint(
    path: Path, config: dict[str, Any], weights: dict[str, mx.array], shards: int = 1
) -> Path:
    """Write a model directory as it comes from the hub, with a tokenizer that fits its rows."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (byte_tokenizer if config.get("vocab_size") == 256 else copy_tokenizer)(path)
    names = sorted(weights)
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
        return path
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        mx.save_safetensors(str(path / file), {n: weights[n] for n in part}, {"format": "mlx"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_llama(path: Path, shards: int = 1, **changes: Any) -> Path:
    """A random Llama checkpoint."""
    model = llama_model(delta=None, **changes)
    weights = dict(tree_flatten(model.parameters()))
    return write_checkpoint(path, {**LLAMA, **changes}, weights, shards)


def write_bitnet(path: Path, **changes: Any) -> Path:
    """A random BitNet checkpoint in the packed layout of microsoft/bitnet-b1.58-2B-4T."""
    model = bitnet.Model(bitnet.ModelArgs.from_dict(BITNET))
    weights = bitnet_weights(model)
    return write_checkpoint(path, {**BITNET, **changes}, weights)


def tokens(length: int, rows: int = 1, seed: int = 0) -> mx.array:
    """Random token ids [rows, length]."""
    return mx.array(np.random.default_rng(seed).integers(0, LLAMA["vocab_size"], (rows, length)))
