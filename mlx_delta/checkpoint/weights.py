"""A model directory's weight files: which there are, whether they are whole, what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_delta.system.memory import free_memory, show_bytes

from .json_file import read_json, shown
from .safetensors_header import Tensor, read_header

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def read_headers(path: Path) -> dict[str, Tensor]:
    """The tensors of a directory by name; no weight is read.

    Raises:
        FileNotFoundError: There are no weights, or a file of several is missing.
        ValueError: A file is truncated or not safetensors, or the index is broken.
    """
    files = sorted(path.glob("model*.safetensors"))
    expected = _indexed(path) | _numbered(files)
    missing = sorted(name for name in expected if not (path / name).is_file())
    if missing:
        raise FileNotFoundError(
            f"[load] {path} lacks {missing[0]} ({len(missing)} of {len(expected)} weight files "
            "missing); fetch the model again."
        )
    if not files:
        raise FileNotFoundError(_no_weights(path))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_header(file)
    return tensors


def _indexed(path: Path) -> set[str]:
    """The files that the index names, if there is one."""
    index = path / INDEX
    if not index.is_file():
        return set()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"[load] {index} is not a valid index of weights: no weight_map.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"[load] {index} is not a valid index of weights: it names {shown(name)}."
            )
    return set(weight_map.values())


def _numbered(files: list[Path]) -> set[str]:
    """The files that belong together by their names, ``model-00001-of-00002.safetensors``."""
    names: set[str] = set()
    for file in files:
        if found := _SHARD.fullmatch(file.name):
            stem, _, count = found.groups()
            names |= {f"{stem}{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))}
    return names


def _no_weights(path: Path) -> str:
    """What to say of a directory without weights, by what it has instead."""
    if any(path.glob("*.gguf")):
        return f"[load] {gguf_advice(path)}"
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return (
            f"[load] {path} has PyTorch weights only; save them as safetensors first "
            "(transformers: save_pretrained)."
        )
    other = sorted(path.glob("*.safetensors"))
    found = f" but {other[0].name}" if other else ""
    return f"[load] {path} has no weights (model*.safetensors){found}."


def gguf_advice(path: Path) -> str:
    """What to do with a GGUF file, or with a directory of them."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if any(re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name) for file in files):
        return (
            f"{path} is a GGUF in several parts; merge them (llama-gguf-split --merge), then "
            "convert the file: python -m mlx_delta.convert FILE -o FOLDER."
        )
    what = "is a GGUF file" if path.is_file() else f"holds a GGUF file ({files[0].name})"
    return f"{path} {what}; convert it: python -m mlx_delta.convert {files[0]} -o FOLDER."


def check_layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse a number of layers that the weights can't have, before one of them is built.

    Raises:
        ValueError: config.json announces more layers than there are tensors.
    """
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(tensors):
        numbers = [int(found[1]) for name in tensors if (found := _LAYER.search(name))]
        raise ValueError(
            f"[load] num_hidden_layers is {layers} in config.json but the weights have "
            f"{max(numbers, default=-1) + 1} layers."
        )


def check_memory(path: Path, tensors: Mapping[str, Tensor], widened: bool) -> None:
    """Refuse weights that this process can't hold: MLX would end it without a word.

    Args:
        path: The model's directory, for the message.
        tensors: Its tensors.
        widened: Whether 16-bit floats become float32, as without a GPU.

    Raises:
        MemoryError: They are larger than the memory that is free.
    """
    size = 0
    for tensor in tensors.values():
        wide = widened and tensor.dtype in ("F16", "BF16")
        size += tensor.nbytes * (2 if wide else 1)
    free, limit = free_memory()
    if size > free:
        raise MemoryError(
            f"[load] the weights of {path} take {show_bytes(size)} but {limit} leaves "
            f"{show_bytes(max(free, 0))}; use a smaller or more strongly quantized model."
        )


def check_types(model: nn.Module) -> None:
    """Refuse weights of another type than their layer multiplies with.

    Raises:
        ValueError: Floating-point weights hold integers, or packed ones are no packed words.
    """
    for path, module in model.named_modules():
        packed = "scales" in module
        for name, weight in module.items():
            if not isinstance(weight, mx.array) or name.startswith("_"):
                continue
            is_float = mx.issubdtype(weight.dtype, mx.floating)
            if packed and name == "weight" and weight.dtype != mx.uint32:
                must = "be packed in uint32"
            elif packed and name == "scales" and not is_float and weight.dtype != mx.uint8:
                must = "be floating point"
            elif name in ("biases", "bias") and not is_float:
                must = "be floating point"
            elif name == "weight" and not packed and not is_float:
                must = "be floating point"
            else:
                continue
            raise ValueError(f"[load] tensor {path}.{name} must {must} but is {weight.dtype}.")


def check_finite(model: nn.Module) -> None:
    """Refuse weights that hold an infinity or no number at all; reads all floats once.

    Raises:
        ValueError: One does; the message names it.
    """
    parameters: Any = tree_flatten(model.parameters())
    floats = [(n, w) for n, w in parameters if mx.issubdtype(w.dtype, mx.floating) and w.size]
    # A sum is as good a test as asking each number, and reads them once.
    sums = [mx.sum(weight.astype(mx.float32)) for _, weight in floats]
    mx.eval(sums)
    for (name, weight), total in zip(floats, sums, strict=True):
        if not mx.isfinite(total).item() and not mx.all(mx.isfinite(weight)).item():
            raise ValueError(
                f"[load] tensor {name} holds values that are not finite: the file is broken, or "
                "its numbers were too large for their type."
            )
