"""Headers of safetensors files, checked in full before MLX maps the file.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's
length, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .json_file import check_regular, parse_object, shown

# Bytes of an element. MLX refuses by itself those that it has no type for.
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2},
    **{"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor of a header.

    Attributes:
        dtype: As the format writes it, ``"F16"``.
        shape: Its dimensions.
        start: Its first byte in the file.
        nbytes: Its size.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated, not safetensors, or its header contradicts itself.
    """
    size = check_regular(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(f"[load] {file} is truncated or not a safetensors file.")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"[load] {file} announces a safetensors header of {length} bytes.")
        try:
            name = f"the safetensors header of {file}"
            header = parse_object(stream.read(length), name, unique=True)
        except ValueError as error:
            raise ValueError(f"[load] {file} has a broken safetensors header.") from error
    metadata = header.pop("__metadata__", {})
    metadata = {} if metadata is None else metadata  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError(f"[load] {file} has a broken safetensors header: its metadata.")
    data = 8 + length
    tensors = {name: _entry(file, name, entry, data) for name, entry in header.items()}
    end = max((t.start + t.nbytes for t in tensors.values()), default=data)
    if end != size:
        cut = {n: t.start for n, t in tensors.items() if t.start + t.nbytes > size}
        what = f" (tensor {min(cut, key=lambda name: cut[name])} is cut off)" if cut else ""
        raise ValueError(
            f"[load] {file} has {size} bytes but its header announces {end}{what}; fetch or "
            "convert it again."
        )
    position = data
    for name, tensor in sorted(tensors.items(), key=lambda x: (x[1].start, x[1].nbytes)):
        if tensor.start != position:
            raise ValueError(
                f"[load] {file} has a broken safetensors header: tensor {shown(name)} overlaps "
                "another or leaves a gap."
            )
        position += tensor.nbytes
    return tensors


def _entry(file: Path, name: str, entry: Any, data: int) -> Tensor:
    """One tensor of a header; offsets count from where the data begin."""
    where = f"[load] {file} has a broken safetensors header: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} needs dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{where} has the type {shown(dtype)}, which is unknown.")
    if not _whole(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{where} has the shape {shown(shape)}.")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has the offsets {shown(offsets)}.")
    nbytes = offsets[1] - offsets[0]
    if max(shape, default=0) > 2**31 - 1 or math.prod(shape) * ITEM_BYTES[dtype] != nbytes:
        raise ValueError(f"{where} has {nbytes} bytes, not those of {shown(shape)} of {dtype}.")
    return Tensor(dtype, tuple(shape), data + offsets[0], nbytes)


def _whole(values: Any) -> bool:
    """Whether it is a list of whole numbers >= 0."""
    return isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)
