"""Hugging Face checkpoints: Llama and BitNet, sharded or not, packed or full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.ternary.codes import LEAST_MEAN, ternarize

from .architecture import read_architecture
from .errors import ConvertError
from .files import read_json, regular_file
from .safetensors_io import ITEM_BYTES, Tensor, read_header
from .ternary import check_codes, unpack_u8_rows
from .weights import Source, Ternary, Weight, check_finite, check_tensors

MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INDEX = "model.safetensors.index.json"
# Rows read at once where a whole tensor is gone through: about 16 MB of float32.
PASS_ELEMENTS = 4 << 20


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """Every tensor of a directory's safetensors files, and the files.

    Raises:
        ConvertError: There is none, a shard is missing or broken, the index names a file
            elsewhere, or two files hold the same tensor.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConvertError(f"{index} has no weight_map.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            # A file name and nothing else: an index must not lead out of its directory.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ConvertError(f"{index} names the file {name[:120]!r}; expected a shard.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        weight_map = None
    if not files:
        raise ConvertError(
            f"{folder} has no .safetensors files; PyTorch .bin checkpoints must be saved as "
            "safetensors first (transformers: save_pretrained)."
        )
    single = folder / "model.safetensors"
    if weight_map is not None and single not in files and single.is_file():
        # As mlx_lm.fuse leaves it: loaders differ in which they take.
        raise ConvertError(
            f"{folder} holds model.safetensors and an index of other files; remove {INDEX}, or "
            "model.safetensors if the others are the model."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        regular_file(file)
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ConvertError(f"{file} and {tensors[name].file.name} both hold {name[:120]}.")
            tensors[name] = tensor
    if weight_map is not None:
        missing = [name for name in weight_map if name not in tensors]
        if missing:
            raise ConvertError(f"{index} names {missing[0][:120]}, which no shard holds.")
    return tensors, files


def read_safetensors(folder: Path) -> Source:
    """Read a Hugging Face checkpoint as far as its headers.

    Raises:
        ConvertError: Something in it is missing, broken or not supported.
    """
    config = read_json(folder / "config.json")
    tensors, files = read_tensors(folder)
    arch = read_architecture(config, str(folder / "config.json"), "lm_head.weight" in tensors)
    scale_divides = _check_quantization(config, str(folder))
    dropped = drop_unused(tensors, arch.tied)
    expected = arch.tensors()
    linears = {path + ".weight" for path in arch.linears()}
    is_bitnet = arch.model_type == "bitnet" or scale_divides is not None
    scales = {name: t for name, t in tensors.items() if name.endswith(".weight_scale")}
    shapes = {}
    for name, tensor in tensors.items():
        if name in scales:
            continue
        if tensor.dtype == "U8" and name in linears and tensor.shape:
            shapes[name] = (tensor.shape[0] * 4, *tensor.shape[1:])
        else:
            shapes[name] = tensor.shape
    check_tensors(shapes, expected, str(folder))
    weights = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        scale = scales.pop(name + "_scale", None)
        if tensor.dtype == "U8":
            weights[name] = packed_weight(tensor, scale, shape, bool(scale_divides))
        elif tensor.dtype not in MLX_DTYPES:
            raise ConvertError(
                f"{tensor.file}: {name} has the type {tensor.dtype}; expected F32, F16 or BF16."
            )
        elif scale is not None:
            raise ConvertError(f"{tensor.file}: {name} is not packed but has a weight_scale.")
        elif is_bitnet and name in linears:
            weights[name] = _master(tensor)
        else:
            weights[name] = float_weight(tensor)
    if scales:
        raise ConvertError(f"{folder} holds {next(iter(scales))[:120]!r} without its weight.")
    inputs = [folder / "config.json", *files]
    dtype = main_dtype(config, tensors)
    return Source(folder.name, "safetensors", config, arch, weights, dtype, {}, inputs, dropped)


def drop_unused(tensors: dict[str, Tensor], tied: bool) -> dict[str, str]:
    """Take tensors that loaders ignore out of ``tensors``; what they were, by name."""
    dropped = {
        name: "rotary frequencies, computed from config.json"
        for name in tensors
        if name.endswith("self_attn.rotary_emb.inv_freq")
    }
    if tied and "lm_head.weight" in tensors:
        dropped["lm_head.weight"] = "config.json ties it to the embedding"
    for name in dropped:
        del tensors[name]
    return dropped


def _check_quantization(config: dict[str, Any], where: str) -> bool | None:
    """Whether the scale divides the ternary codes; ``None`` for a model that isn't quantized.

    ``autobitlinear`` multiplies, ``bitlinear`` (the default) divides: transformers,
    integrations/bitnet.py.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "bitnet":
        raise ConvertError(
            f"{where} is already quantized ({str(method)[:40]!r}); give the original, or a GGUF or "
            "mlx-lm version of it."
        )
    if quantization.get("use_rms_norm"):
        raise ConvertError(f"{where} has use_rms_norm: norms inside its linears; not supported.")
    linear_class = quantization.get("linear_class", "bitlinear")
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise ConvertError(f"{where} has linear_class {str(linear_class)[:40]!r}; unknown.")
    return linear_class == "bitlinear"


def main_dtype(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """What config.json says (as mlx_lm.convert takes it), else the type of most bytes."""
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str) and named in CONFIG_DTYPES:
        return CONFIG_DTYPES[named]
    totals = dict.fromkeys(MLX_DTYPES, 0)
    for tensor in tensors.values():
        if tensor.dtype in totals:
            totals[tensor.dtype] += tensor.nbytes
    return max(totals, key=lambda dtype: totals[dtype])


def to_mlx(data: np.ndarray, dtype: str) -> mx.array:
    """An array as read from a file, in MLX's type."""
    array = mx.array(data)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def float_weight(tensor: Tensor) -> Weight:
    """A tensor of floating-point numbers."""

    def read(start: int, stop: int) -> mx.array:
        data = tensor.read(start, stop)
        check_finite(data, tensor.dtype, tensor.name)
        return to_mlx(data, tensor.dtype)

    return Weight(tensor.name, tensor.shape, "float", tensor.dtype, tensor.nbytes, read)


def packed_weight(
    tensor: Tensor, scale: Tensor | None, shape: tuple[int, ...], divides: bool
) -> Weight:
    """Ternary codes, four to a byte, and one scale that multiplies or divides them.

    Raises:
        ConvertError: There is no such scale.
    """
    if (
        scale is None
        or scale.dtype not in MLX_DTYPES
        or scale.nbytes != ITEM_BYTES[scale.dtype]
        or len(shape) != 2
    ):
        raise ConvertError(f"{tensor.file}: {tensor.name} is packed but has no weight_scale.")
    data = scale.read()
    check_finite(data, scale.dtype, scale.name)
    value = np.array(to_mlx(data.reshape(-1), scale.dtype).astype(mx.float32))
    if divides:
        if value[0] == 0:
            raise ConvertError(f"{scale.file}: {scale.name} is 0 and divides the weights.")
        value = np.float32(1) / value

    def read(start: int, stop: int) -> Ternary:
        codes = unpack_u8_rows(tensor.read, shape[0], start, stop)
        return Ternary(check_codes(codes, tensor.name), value)

    nbytes = tensor.nbytes + scale.nbytes
    return Weight(tensor.name, shape, "ternary", "ternary U8", nbytes, read)


def _master(tensor: Tensor) -> Weight:
    """Full-precision weights that BitNet rounds to ternary ones whenever it runs."""
    rows = tensor.shape[0]
    mean: list[float] = []

    def absolute_mean() -> float:
        # One pass over the tensor, once: the rounding depends on all of it.
        if not mean:
            step = max(1, PASS_ELEMENTS // tensor.shape[1])
            total = 0.0
            for start in range(0, rows, step):
                data = tensor.read(start, min(rows, start + step))
                check_finite(data, tensor.dtype, tensor.name)
                values = np.array(to_mlx(data, tensor.dtype).astype(mx.float32))
                # In float64: a float32 sum of millions of terms drifts.
                total += float(np.abs(values).sum(dtype=np.float64))
            mean.append(max(total / (rows * tensor.shape[1]), LEAST_MEAN))
        return mean[0]

    def read(start: int, stop: int) -> Ternary:
        scale = absolute_mean()
        values = to_mlx(tensor.read(start, stop), tensor.dtype)
        codes = ternarize(values, mx.array(scale, dtype=mx.float32))
        return Ternary(np.array(codes), np.array([scale], dtype=np.float32))

    source_type = f"ternary master {tensor.dtype}"
    return Weight(tensor.name, tensor.shape, "ternary", source_type, tensor.nbytes, read)
