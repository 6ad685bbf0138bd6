"""Adapters: mlx-lm's own, and LoRA as PEFT and what builds on it (Unsloth, TRL) save it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.tuner.utils import load_adapters as load_mlx_adapters

from .json_file import one_line, read_json, shown
from .safetensors_header import read_header

CONFIG = "adapter_config.json"
MLX_WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"

# PEFT wraps the model as base_model.model; the adapter's own name may stand before "weight".
_PEFT_NAME = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.\w+)??(?:\.weight)?"
)
# Settings of PEFT's that change what is computed and are not read here; what they are when unused.
_PEFT_UNUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
}


def apply_adapters(model: nn.Module, adapter_path: str | Path) -> None:
    """Add an adapter's layers to a model, with their weights.

    Args:
        model: The model it was trained on.
        adapter_path: A directory with adapter_config.json and the weights, of mlx-lm
            (``adapters.safetensors``) or of PEFT (``adapter_model.safetensors``).

    Raises:
        FileNotFoundError: There is no such directory, or a file of it is missing.
        ValueError: It is of a kind that can't be read, or does not fit the model.
    """
    path = Path(adapter_path).expanduser()
    if not path.is_dir():
        what = "is a file; give the directory it is in" if path.exists() else "does not exist"
        raise FileNotFoundError(f"[load] adapter_path {path} {what}.")
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"[load] {path} has no {CONFIG}: not an adapter directory.")
    config = read_json(path / CONFIG)
    if "peft_type" in config or (path / PEFT_WEIGHTS).is_file():
        _apply_peft(model, path, config)
    else:
        _apply_mlx(model, path, config)
    model.eval()


# mlx-lm's own.


def _apply_mlx(model: nn.Module, path: Path, config: Mapping[str, Any]) -> None:
    """Add mlx-lm's adapter layers."""
    if not (path / MLX_WEIGHTS).is_file():
        old = " (adapters.npz is of an old mlx-lm: save it as safetensors)"
        raise FileNotFoundError(
            f"[load] {path} has no {MLX_WEIGHTS}{old if (path / 'adapters.npz').exists() else ''}."
        )
    read_header(path / MLX_WEIGHTS)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise _wrong(path, "fine_tune_type", "be lora, dora or full", kind)
    try:
        if kind == "lora" and "num_layers" not in config:
            # Before mlx-lm 0.20 the entry was called lora_layers.
            layers, settings = _lora_settings(path, config, "lora_layers")
            linear_to_lora_layers(model, layers, settings)
            _load_mlx_weights(model, path)
        else:
            if kind != "full":
                _lora_settings(path, config, "num_layers")
            load_mlx_adapters(model, str(path))
    except (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"[load] the adapter in {path} can't be read: {one_line(error)}"
        ) from error
    except ValueError as error:
        text = one_line(error)
        raise ValueError(text if text.startswith("[load]") else f"[load] {text}") from error


def _lora_settings(
    path: Path, config: Mapping[str, Any], layers_entry: str
) -> tuple[int, dict[str, Any]]:
    """The number of layers and the parameters of LoRA, checked."""
    layers = config.get(layers_entry)
    if layers is None:
        raise ValueError(
            f"[load] {path / CONFIG} has neither num_layers (mlx-lm) nor peft_type (PEFT): of an "
            "unknown kind."
        )
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise _wrong(path, layers_entry, "be a whole number", layers)
    settings = config.get("lora_parameters")
    if not isinstance(settings, Mapping):
        raise _wrong(path, "lora_parameters", "hold rank, scale and dropout", settings)
    rank = settings.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 1 << 16:
        raise _wrong(path, "lora_parameters.rank", "be a whole number >= 1", rank)
    scale = settings.get("scale")
    if not _is_number(scale):
        raise _wrong(path, "lora_parameters.scale", "be a number", scale)
    dropout = settings.get("dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise _wrong(path, "lora_parameters.dropout", "be in [0, 1)", dropout)
    keys = settings.get("keys")
    is_names = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if keys is not None and not is_names:
        raise _wrong(path, "lora_parameters.keys", "be a list of names", keys)
    return layers, {**settings, "dropout": dropout}


def _load_mlx_weights(model: nn.Module, path: Path) -> None:
    """Load LoRA weights into layers that stand already, each of which must fit."""
    flat: Any = tree_flatten(model.parameters())
    parameters = dict(flat)
    weights: Any = mx.load(str(path / MLX_WEIGHTS))
    for name, weight in weights.items():
        own = parameters.get(name) if name.endswith((".lora_a", ".lora_b")) else None
        if own is None or own.shape != weight.shape:
            raise ValueError(
                f"[load] the adapter in {path} does not fit the model: tensor {name} of shape "
                f"{weight.shape}."
            )
    model.load_weights(list(weights.items()), strict=False)


# PEFT's.


def _apply_peft(model: nn.Module, path: Path, config: Mapping[str, Any]) -> None:
    """Add mlx-lm's LoRA layers with PEFT's weights, each to the module that it names."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"[load] the adapter in {path} is PEFT's {shown(kind)}; LORA is read.")
    for name, unused in _PEFT_UNUSED.items():
        if config.get(name) not in unused:
            raise ValueError(
                f"[load] the adapter in {path} has {name} {shown(config[name])}, which is not "
                "read; merge it into its model with PEFT (merge_and_unload)."
            )
    if not (path / PEFT_WEIGHTS).is_file():
        pickled = " (adapter_model.bin is not read: save it as safetensors)"
        raise FileNotFoundError(
            f"[load] {path} has no {PEFT_WEIGHTS}"
            f"{pickled if (path / 'adapter_model.bin').exists() else ''}."
        )
    read_header(path / PEFT_WEIGHTS)
    modules = dict(model.named_modules())
    layers: list[tuple[str, nn.Module]] = []
    for name, (a, b) in sorted(_peft_pairs(path).items()):
        module = modules.get(name)
        if module is None:
            raise ValueError(
                f"[load] the adapter in {path} does not fit the model: it has no {name}."
            )
        layers.append((name, _lora_layer(path, name, module, a, b, _scale(path, config, name, a))))
    model.update_modules(tree_unflatten(layers))


def _peft_pairs(path: Path) -> dict[str, tuple[mx.array, mx.array]]:
    """For each module's path A [r, in] and B [out, r]."""
    found: dict[str, dict[str, mx.array]] = {}
    weights: Any = mx.load(str(path / PEFT_WEIGHTS))
    for name, weight in weights.items():
        match = _PEFT_NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"[load] the adapter in {path} holds tensor {shown(name)}, which is no part of "
                "LoRA; merge it into its model with PEFT (merge_and_unload)."
            )
        if weight.ndim != 2 or not mx.issubdtype(weight.dtype, mx.floating):
            raise ValueError(
                f"[load] the adapter in {path}: tensor {name} must be a matrix of floats but is "
                f"{weight.dtype} {weight.shape}."
            )
        found.setdefault(match["path"], {})[match["part"][-1]] = weight
    if not found:
        raise ValueError(f"[load] the adapter in {path} has no weights.")
    for name, parts in found.items():
        ranks = [parts["A"].shape[0], parts["B"].shape[1]] if set(parts) == {"A", "B"} else [0]
        if min(ranks) < 1 or min(ranks) != max(ranks):
            raise ValueError(f"[load] the adapter in {path} has no matching A and B for {name}.")
    return {name: (parts["A"], parts["B"]) for name, parts in found.items()}


def _scale(path: Path, config: Mapping[str, Any], name: str, a: mx.array) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilized LoRA (PEFT, tuners/lora)."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise _wrong(path, "alpha_pattern", "be an object", patterns)
    for pattern, value in patterns.items():
        # PEFT takes them as regular expressions; a file's would be free to take forever.
        if not re.fullmatch(r"[\w.]+", pattern):
            raise _wrong(path, "alpha_pattern", "hold plain names", pattern)
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
            break
    if not _is_number(alpha):
        raise _wrong(path, "lora_alpha", "be a number", alpha)
    rank = a.shape[0]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _lora_layer(
    path: Path, name: str, module: Any, a: mx.array, b: mx.array, scale: float
) -> nn.Module:
    """A LoRA layer of mlx-lm's around a module: ``y + scale * (x @ A.T) @ B.T``."""
    layer: LoRALinear | LoRAEmbedding
    base: Any = module  # whose annotation at mlx-lm leaves quantized layers out
    if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
        layer = LoRALinear.from_base(base, r=a.shape[0], scale=scale)
    elif isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        layer = LoRAEmbedding.from_base(base, r=a.shape[0], scale=scale)
    else:
        kind = type(module).__name__
        raise ValueError(f"[load] the adapter in {path}: {name} is a {kind}, not a linear layer.")
    if (a.T.shape, b.T.shape) != (layer.lora_a.shape, layer.lora_b.shape):
        raise ValueError(
            f"[load] the adapter in {path} does not fit the model: {name} takes A and B of shapes "
            f"{layer.lora_a.T.shape} and {layer.lora_b.T.shape} but got {a.shape} and {b.shape}."
        )
    dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else _dtype(module)
    layer.lora_a, layer.lora_b = (mx.contiguous(x.T).astype(dtype) for x in (a, b))
    return layer


def _dtype(module: Any) -> mx.Dtype:
    """The type that a layer computes in."""
    found = module.scales if "scales" in module else module.weight
    return found.dtype if mx.issubdtype(found.dtype, mx.floating) else mx.bfloat16


def _wrong(path: Path, name: str, must: str, value: Any) -> ValueError:
    return ValueError(f"[load] {name} must {must} in {path / CONFIG} but got {shown(value)}.")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e30
