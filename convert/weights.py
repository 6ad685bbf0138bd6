"""What every source format is read into: named weights whose rows are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from .architecture import Architecture
from .errors import ConvertError

Kind = Literal["float", "affine", "ternary"]


@dataclass(frozen=True)
class Affine:
    """Rows in MLX's own quantization: value = scale * code + bias, a group at a time.

    Attributes:
        codes: [rows, in * bits / 32] uint32, low bits first.
        scales: [rows, in / group] float32, bfloat16 or float16.
        biases: As scales.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array


@dataclass(frozen=True)
class Ternary:
    """Rows of ternary weights: value = (code - 1) * scale.

    Attributes:
        codes: [rows, in] uint8 with values 0, 1, 2.
        scales: [rows, in / block] float32; one value where one scale holds for everything.
    """

    codes: np.ndarray
    scales: np.ndarray


Rows = mx.array | Affine | Ternary


@dataclass(frozen=True)
class Weight:
    """A tensor of a source.

    ``read(start, stop)`` gives the rows start..stop as ``kind`` says: an array [rows, ...],
    ``Affine`` or ``Ternary``. Rows are read in multiples of ``row_multiple``.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    source_type: str
    source_bytes: int
    read: Callable[[int, int], Any]
    row_multiple: int = 1
    group_size: int = 0
    bits: int = 0
    lossy: bool = False  # what read gives is not the source's values exactly

    @property
    def path(self) -> str:
        """The module that it belongs to."""
        return self.name.rpartition(".")[0]

    def dequantized(self, start: int, stop: int) -> mx.array:
        """The rows as float32, which is exact for every kind."""
        rows = self.read(start, stop)
        if isinstance(rows, Affine):
            return dequantize_affine(rows, self.group_size, self.bits)
        if isinstance(rows, Ternary):
            return dequantize_ternary(rows)
        return rows.astype(mx.float32)


@dataclass
class Source:
    """A checkpoint, read as far as its headers.

    Attributes:
        name: The last part of its path or its hub name, for reports.
        format: ``safetensors``, ``gguf`` or ``mlx``.
        config: config.json in Hugging Face's terms.
        arch: The same, checked.
        weights: By their name in the output.
        dtype: The type that holds its weights best, as safetensors names it.
        files: What goes along: tokenizer, templates; contents by file name.
        inputs: The files that it was read from.
        dropped: Tensors left out, with the reason.
        notes: What a user should know about this source.
    """

    name: str
    format: str
    config: dict[str, Any]
    arch: Architecture
    weights: dict[str, Weight]
    dtype: str
    files: dict[str, bytes] = field(default_factory=dict)
    inputs: list[Path] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def dequantize_affine(rows: Affine, group_size: int, bits: int) -> mx.array:
    """float32 values; the products of small integers and half-precision scales are exact."""
    scales, biases = rows.scales.astype(mx.float32), rows.biases.astype(mx.float32)
    return mx.dequantize(rows.codes, scales, biases, group_size, bits)


def dequantize_ternary(rows: Ternary) -> mx.array:
    """float32 values [rows, in]."""
    values = rows.codes.astype(np.float32) - 1
    if rows.scales.size == 1:
        return mx.array(values * rows.scales.reshape(1, 1))
    block = rows.codes.shape[1] // rows.scales.shape[1]
    return mx.array(values * np.repeat(rows.scales, block, axis=1))


def check_finite(array: np.ndarray, dtype: str, name: str) -> None:
    """Refuse NaN and infinity; ``array`` in the dtype of ``safetensors_io.NUMPY``.

    On the bits: several times faster than comparing floating-point numbers here.

    Raises:
        ConvertError: There is one.
    """
    bits, infinity = {
        "F32": (np.uint32, 0x7F800000),
        "F16": (np.uint16, 0x7C00),
        "BF16": (np.uint16, 0x7F80),
    }[dtype]
    largest = int((array.view(bits) & bits(infinity)).max(initial=0))
    if largest == infinity:
        raise ConvertError(f"tensor {name} holds NaN or infinity; the checkpoint is broken.")


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare names and shapes.

    Raises:
        ConvertError: A tensor is missing, unexpected or of another shape.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise ConvertError(
            f"{where} lacks {missing[0]} ({len(missing)} of {len(expected)} tensors missing); "
            "config.json does not belong to these weights, or a file is missing."
        )
    for name, shape in found.items():
        if name not in expected:
            raise ConvertError(
                f"{where} holds {name[:120]!r}, which a model of its config.json does not have."
            )
        if shape != expected[name]:
            raise ConvertError(
                f"{where}: {name} has the shape {list(shape)} but config.json asks for "
                f"{list(expected[name])}."
            )
