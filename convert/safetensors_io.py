"""Safetensors files: a strict header check, reads of single rows, and a streaming writer.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's
length, a JSON header, then the tensors without gaps. A header is checked in full before a byte
of data is read, so that a hostile file is refused instead of being mapped or allocated.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConvertError
from .files import parse_json, regular_file

# Bytes of an element. numpy has no bfloat16; it travels as uint16.
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2},
    **{"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}

# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
# Pieces of a tensor that may wait to be written.
MAX_PENDING = 6


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``start`` is its first byte in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop`` as [rows, ...] in the dtype of ``NUMPY``."""
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        data = np.empty((stop - start) * self.row_bytes, dtype=np.uint8)
        read_exactly(self.file, self.start + start * self.row_bytes, data)
        return data.view(NUMPY[self.dtype]).reshape(stop - start, *self.shape[1:])


def read_exactly(file: Path, offset: int, out: np.ndarray) -> None:
    """Fill ``out`` (bytes) from a file.

    Raises:
        ConvertError: The file ends before.
    """
    view = out.view(np.uint8).reshape(-1).data
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise ConvertError(f"{file} became shorter while it was read; start again.")
            done += count


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, checked: known types, sizes that agree, no gap and no overlap.

    Raises:
        ConvertError: The file is not safetensors, is truncated, or its header is inconsistent.
    """
    size = regular_file(file).st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise ConvertError(f"{file} has {size} bytes: not a safetensors file.")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ConvertError(
                f"{file} announces a header of {length} bytes but has {size}: truncated or not a "
                "safetensors file; fetch it again."
            )
        header = parse_json(stream.read(length), f"the header of {file}")
    if not isinstance(header, dict):
        raise ConvertError(f"the header of {file} is not a JSON object.")
    header.pop("__metadata__", None)
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != position:
            raise ConvertError(f"{file}: tensor {tensor.name!r} overlaps another or leaves a gap.")
        position += tensor.nbytes
    if position != size:
        raise ConvertError(
            f"{file} has {size} bytes but its header announces {position}: truncated or changed; "
            "fetch it again."
        )
    return tensors


def _entry(file: Path, name: str, entry: Any, data_start: int) -> Tensor:
    """One tensor of a header."""
    where = f"{file}: tensor {name[:120]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConvertError(f"{where} has a broken header entry.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ConvertError(f"{where} has the type {str(dtype)[:40]!r}, which is unknown.")
    if not _whole(shape) or len(shape) > MAX_DIMENSIONS:
        raise ConvertError(f"{where} has the shape {str(shape)[:80]}.")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConvertError(f"{where} has the offsets {str(offsets)[:80]}.")
    count = 1
    for dimension in shape:
        count *= dimension
    nbytes = offsets[1] - offsets[0]
    if count * ITEM_BYTES[dtype] != nbytes:
        raise ConvertError(
            f"{where}: shape {shape} of {dtype} takes {count * ITEM_BYTES[dtype]} bytes but has "
            f"{nbytes}."
        )
    return Tensor(file, name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _whole(values: Any) -> bool:
    """Whether it is a list of whole numbers that are not negative."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


class Writer:
    """Writes one safetensors file in any order of its rows, without holding a tensor.

    The header is known from the start: shapes and types come from the plan.
    """

    def __init__(self, path: Path, specs: Iterable[Spec]):
        # Wider types first, so that every tensor is aligned to its type.
        ordered = sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtype])
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        position = 0
        for spec in ordered:
            offsets = [position, position + spec.nbytes]
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": offsets,
            }
            position += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._specs = {spec.name: spec for spec in ordered}
        self._starts = {
            spec.name: 8 + len(text) + header[spec.name]["data_offsets"][0] for spec in ordered
        }
        # Written by a thread of its own: the disk need not wait for the next rows, nor they for it.
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(8 + len(text) + position)
        self._file.flush()

    def write(self, name: str, row: int, data: np.ndarray) -> None:
        """Write ``data`` [rows, ...] from row ``row`` of tensor ``name`` on."""
        spec = self._specs[name]
        assert data.dtype == NUMPY[spec.dtype] and data.shape[1:] == spec.shape[1:], (spec, data)
        row_bytes = spec.nbytes // spec.shape[0]
        if len(self._pending) >= MAX_PENDING:
            self._pending.popleft().result()
        position = self._starts[name] + row * row_bytes
        self._pending.append(self._pool.submit(self._write_at, position, data))

    def _write_at(self, position: int, data: np.ndarray) -> None:
        """Write all of ``data`` at a place in the file."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], position + done)

    def close(self) -> None:
        """Bring everything to the disk."""
        while self._pending:
            self._pending.popleft().result()
        self._pool.shutdown()
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Give up; what was written so far is of no use."""
        self._pool.shutdown(cancel_futures=True)
        self._file.close()
