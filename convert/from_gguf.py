"""GGUF files of llama.cpp and bitnet.cpp: weights, settings and, where possible, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .architecture import Architecture, read_architecture
from .errors import ConvertError
from .from_safetensors import to_mlx
from .gguf_blocks import AFFINE, TERNARY, affine_rows, float_rows, i2s_codes, ternary_rows
from .gguf_config import ROPE_FACTORS, read_architecture_name, read_config, rename
from .gguf_files import split_advice
from .gguf_header import GGUFTensor, read_header
from .gguf_tokenizer import generation_files, read_gguf_tokenizer
from .weights import Affine, Source, Ternary, Weight, check_finite, check_tensors

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_gguf(file: Path, i2s_layout: str = "x86", tokenizer: bool = True) -> Source:
    """Read a GGUF file as far as its header.

    Args:
        file: The file.
        i2s_layout: ``x86`` or ``arm``, for I2_S tensors.
        tokenizer: Whether its tokenizer is wanted; to build one can take seconds.

    Raises:
        ConvertError: It is broken or not supported.
    """
    metadata, tensors = read_header(file)
    if metadata.get("split.count") not in (None, 0, 1):
        parts = split_advice([file]) or "one of several parts; merge them with llama-gguf-split"
        raise ConvertError(f"{file} is {parts}.")
    factors = tensors.pop(ROPE_FACTORS, None)
    kind = read_architecture_name(metadata, str(file))
    named: dict[str, GGUFTensor] = {}
    for name, tensor in tensors.items():
        if named.setdefault(rename(name, str(file), kind), tensor) is not tensor:
            raise ConvertError(f"{file} holds the tensor {name[:80]!r} under two names.")
    config = read_config(metadata, named, factors, str(file))
    arch = read_architecture(config, str(file), "lm_head.weight" in named)
    check_tensors({name: t.shape for name, t in named.items()}, arch.tensors(), str(file))
    weights = {
        name: _weight(name, named[name], arch, kind == "llama", i2s_layout)
        for name in arch.tensors()
    }
    source = Source(
        file.name.removesuffix(".gguf"),
        "gguf",
        config,
        arch,
        weights,
        # Gemma's activations, like BitNet's scales, go beyond what float16 holds.
        "BF16" if arch.model_type == "bitnet" or arch.windows else _dtype(named),
        inputs=[file],
    )
    types = sorted({tensor.type for tensor in named.values()})
    lossy = [name for name in types if name not in (*AFFINE, *TERNARY, *FLOATS)]
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
    if not tokenizer:
        source.files = generation_files(metadata, arch.vocab)
        return source
    source.files, note = read_gguf_tokenizer(metadata, arch.vocab, str(file))
    if note:
        source.notes.append(note)
    return source


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
    shifted = arch.windows is not None and name.endswith("norm.weight")
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
        if len(tensor.shape) != 1:
            return to_mlx(values, kind)
        array = to_mlx(values.reshape(-1), kind)
        # llama.cpp's converter adds the 1 that Gemma's norms add when they run.
        return array.astype(mx.float32) - 1 if shifted else array

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
