"""Directories that mlx-lm (or this converter) wrote: quantized layers are kept as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from .architecture import read_architecture
from .errors import ConvertError
from .files import read_json
from .from_safetensors import (
    MLX_DTYPES,
    drop_unused,
    float_weight,
    packed_weight,
    read_tensors,
    to_mlx,
)
from .safetensors_io import Tensor
from .weights import Affine, Source, Weight, check_finite, check_tensors

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def is_mlx(config: dict[str, Any]) -> bool:
    """Whether a config.json is one that mlx-lm wrote with quantized layers."""
    return "quantization" in config


def read_mlx(folder: Path) -> Source:
    """Read a quantized mlx-lm directory as far as its headers.

    Raises:
        ConvertError: Something in it is missing, broken or not supported.
    """
    config = read_json(folder / "config.json")
    quantization = config["quantization"]
    mode = quantization.get("mode", "affine") if isinstance(quantization, dict) else None
    if mode != "affine":
        raise ConvertError(
            f"{folder} has quantization mode {str(mode)[:40]!r}; only affine is supported. Convert "
            "the original model instead."
        )
    tensors, files = read_tensors(folder)
    arch = read_architecture(config, str(folder / "config.json"), "lm_head.weight" in tensors)
    dropped = drop_unused(tensors, arch.tied)
    expected = arch.tensors()
    weights, shapes = {}, {}
    used = set(expected)
    dtypes = dict.fromkeys(MLX_DTYPES, 0)
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        path = name.rpartition(".")[0]
        scales, biases = (tensors.get(f"{path}.{part}") for part in ("scales", "biases"))
        if scales is not None and biases is not None and name.endswith(".weight"):
            weights[name] = _affine(tensor, scales, biases, shape, quantization.get(path))
            used |= {scales.name, biases.name}
            dtypes[scales.dtype] += scales.nbytes
        elif tensor.dtype == "U8" and tensor.shape == (shape[0] // 4, *shape[1:]):
            # mlx-lm's BitNet multiplies with the scale, whatever the original did.
            scale = tensors.get(name + "_scale")
            weights[name] = packed_weight(tensor, scale, shape, divides=False)
            used.add(name + "_scale")
        elif tensor.dtype in MLX_DTYPES:
            weights[name] = float_weight(tensor)
            dtypes[tensor.dtype] += tensor.nbytes
        else:
            raise ConvertError(f"{folder}: {name} has the type {tensor.dtype} and no scales.")
        shapes[name] = weights[name].shape
    shapes |= {name: tensor.shape for name, tensor in tensors.items() if name not in used}
    check_tensors(shapes, expected, str(folder))
    dtype = max(dtypes, key=lambda name: dtypes[name])
    inputs = [folder / "config.json", *files]
    return Source(folder.name, "mlx", config, arch, weights, dtype, {}, inputs, dropped)


def _affine(
    codes: Tensor, scales: Tensor, biases: Tensor, shape: tuple[int, ...], entry: Any
) -> Weight:
    """A quantized layer; group size and bits follow from the shapes."""
    where = f"{codes.file}: {codes.name}"
    inputs = shape[-1]
    good = len(shape) == 2 and codes.dtype == "U32" and len(codes.shape) == len(scales.shape) == 2
    if not good or scales.dtype not in MLX_DTYPES or biases.dtype != scales.dtype:
        raise ConvertError(f"{where}: its scales or biases do not go with it.")
    group_size = inputs // scales.shape[1] if scales.shape[1] else 0
    bits = codes.shape[1] * 32 // inputs
    fits = (
        codes.shape == (shape[0], inputs * bits // 32)
        and scales.shape == biases.shape == (shape[0], inputs // (group_size or 1))
        and inputs * bits % 32 == 0
        and group_size in GROUP_SIZES
        and bits in BITS
    )
    if not fits:
        raise ConvertError(
            f"{where}: codes {list(codes.shape)} and scales {list(scales.shape)} do not hold "
            f"{list(shape)} in a known number of bits and group size."
        )
    if isinstance(entry, dict) and entry.get("mode", "affine") != "affine":
        raise ConvertError(f"{where} has quantization mode {str(entry['mode'])[:40]!r}.")

    def read(start: int, stop: int) -> Affine:
        parts = [scales.read(start, stop), biases.read(start, stop)]
        for part in parts:
            check_finite(part, scales.dtype, scales.name)
        return Affine(
            mx.array(codes.read(start, stop)), *(to_mlx(part, scales.dtype) for part in parts)
        )

    return Weight(
        codes.name,
        shape,
        "affine",
        f"affine {bits}-bit, group {group_size}",
        codes.nbytes + scales.nbytes + biases.nbytes,
        read,
        group_size=group_size,
        bits=bits,
    )
