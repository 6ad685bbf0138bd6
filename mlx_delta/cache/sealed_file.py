"""safetensors files with a checksum: looked through before MLX reads a tensor of them.

MLX trusts a file's header. What it announces is compared here with what is there, so that no read
ends beyond the file, and a checksum over every byte tells whether any bit has changed since.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHECKSUM = "sha256"
NO_CHECKSUM = "0" * 64  # holds the checksum's place while it is computed

_LARGEST_HEADER = 100_000_000  # the format's own limit
_CHUNK = 1 << 20
_ITEM_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_ITEM_SIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
# What NumPy calls them; it has no name for BF16.
_NUMPY = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16"}
_NUMPY |= {"F16": "float16", "U32": "uint32", "I32": "int32", "F32": "float32"}
_NUMPY |= {"U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64"}
_NAMES = {name: code for code, name in _NUMPY.items()}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        names: Its tensors.
        metadata: Its text entries.
        raw: The header as it stands in the file, its length (8 bytes) included.
    """

    names: list[str]
    metadata: dict[str, str]
    raw: bytes


def read_header(file: Path) -> Header:
    """Read a safetensors file's header, and compare it with the file.

    Raises:
        ValueError: It is broken, or announces other bytes than there are.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise ValueError("it is cut off, or no safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
        metadata = header.pop("__metadata__", {})
        spans = [_span(name, entry) for name, entry in header.items()]
        if any(type(value) is not str for value in metadata.values()):
            raise ValueError("metadata must be text")
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is broken ({error})") from error
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError(f"its header is broken (bytes {begin} and {end} must meet)")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes but announces {8 + length + end}")
    return Header(list(header), metadata, start + text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two equal keys they take."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _span(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, after a check against its type and shape."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError(f"tensor {name} has shape {str(shape)[:40]}")
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number < 1 << 48:
            raise ValueError(f"tensor {name} has {str(number)[:40]} where a count belongs")
    if any(number >= 1 << 31 for number in shape):
        raise ValueError(f"tensor {name} is too large for an array")
    if end - begin != math.prod(shape) * _ITEM_SIZES[entry["dtype"]]:
        raise ValueError(f"tensor {name} has {end - begin} bytes, which its shape contradicts")
    return begin, end


def seal(file: Path, key: str) -> None:
    """Put the checksum in the place that metadata entry ``key`` keeps with ``NO_CHECKSUM``.

    Raises:
        ValueError: The file is not whole.
    """
    header = read_header(file)
    start = _place(header, key)
    digest = _digest(file, header, start)
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(digest.encode())


def check_seal(file: Path, header: Header, key: str) -> None:
    """Compare a file with its checksum, if it has one.

    Raises:
        ValueError: Some bit of the file has changed.
    """
    if (
        key in header.metadata
        and _digest(file, header, _place(header, key)) != header.metadata[key]
    ):
        raise ValueError("it was changed or damaged since it was written (wrong checksum)")


def _place(header: Header, key: str) -> int:
    """Where in the file a checksum stands."""
    entry = f'"{key}":"{header.metadata[key]}"'.encode()
    if len(header.metadata[key]) != len(NO_CHECKSUM) or header.raw.count(entry) != 1:
        raise ValueError("it was changed or damaged since it was written (no such checksum)")
    return header.raw.index(entry) + len(entry) - len(NO_CHECKSUM) - 1


def _digest(file: Path, header: Header, start: int) -> str:
    """SHA-256 of a file's bytes, the checksum itself taken as ``NO_CHECKSUM``."""
    raw = header.raw
    digest = hashlib.sha256(raw[:start] + NO_CHECKSUM.encode() + raw[start + len(NO_CHECKSUM) :])
    with file.open("rb") as stream:
        stream.seek(len(raw))
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sealed_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A whole file with a checksum, as it is to be written."""
    header: dict[str, Any] = {"__metadata__": {CHECKSUM: NO_CHECKSUM, **metadata}}
    end = 0
    for name, array in arrays.items():
        span = [end, end + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": array.shape}
        header[name]["data_offsets"] = span
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text
    data += b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(NO_CHECKSUM.encode(), digest, 1)


def read_sealed(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file with a checksum, which is compared.

    Raises:
        OSError: It can't be read.
        ValueError: It is broken, has no checksum or another one, or types NumPy does not know.
    """
    header = read_header(file)
    if CHECKSUM not in header.metadata:
        raise ValueError("it has no checksum")
    check_seal(file, header, CHECKSUM)
    entries = json.loads(header.raw[8:])
    data = np.fromfile(file, np.uint8, offset=len(header.raw))
    arrays = {}
    for name in header.names:
        begin, end = entries[name]["data_offsets"]
        if entries[name]["dtype"] not in _NUMPY:
            raise ValueError(f"tensor {name} is of type {entries[name]['dtype']}")
        kind = np.dtype(_NUMPY[entries[name]["dtype"]])
        arrays[name] = np.frombuffer(data[begin:end].tobytes(), kind).reshape(
            entries[name]["shape"]
        )
    return arrays, header.metadata
