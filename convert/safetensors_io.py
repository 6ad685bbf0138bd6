"""Safetensors files: a header checked before all else, reads of single rows, a streaming writer.

:mod:`mlx_delta.checkpoint.safetensors_header` reads a header as for loading a model, and checks it
in full before a byte of data is read, so that a hostile file is refused instead of being mapped or
allocated.
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

from mlx_delta.checkpoint import safetensors_header
from mlx_delta.checkpoint.safetensors_header import ITEM_BYTES

from .errors import ConvertError
from .files import regular_file

# numpy has no bfloat16; it travels as uint16.
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}

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
    try:
        regular_file(file)
        return {
            name: Tensor(file, name, t.dtype, t.shape, t.start, t.nbytes)
            for name, t in safetensors_header.read_header(file).items()
        }
    except ConvertError:
        raise
    except ValueError as error:  # the reader that loads models
        raise ConvertError(str(error).removeprefix("[load] ")) from None


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
