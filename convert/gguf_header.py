"""Reading a GGUF file's header, strictly: every count and size is checked before it is used.

The ``gguf`` package's reader maps the file and builds one array for each element of each list,
follows any count it is given, and knows no I2_S; mlx's stops silently at the first type that it
does not know. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import ConvertError
from .files import regular_file
from .safetensors_io import read_exactly

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Larger ones are not what they claim to be; Llama 3's vocabulary with its merges takes 8 MB.
MAX_HEADER_BYTES = 512 << 20
MAX_ITEMS = 1 << 22
MAX_DIMENSIONS = 4

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9

# Type id: name, weights in a block, bytes of a block. ggml.h's ggml_type and ggml-common.h; 36
# is Microsoft's bitnet.cpp's (I2_S has 32 bytes more at its end).
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    36: ("I2_S", 4, 1),
}
I2_S_TAIL = 32
# bitnet.cpp's TL1 and TL2 depend on the machine they were made for.
REFUSED = {37: "I8_S", 38: "TL1", 39: "TL2 (or MXFP4)", 40: "NVFP4"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor: ``shape`` is [rows, in] as elsewhere here, the reverse of the file's order."""

    file: Path
    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    block: int
    block_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.block * self.block_bytes

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The bytes of rows start..stop, uint8 [rows, row_bytes]."""
        return self.read_bytes(start * self.row_bytes, (stop - start) * self.row_bytes).reshape(
            stop - start, self.row_bytes
        )

    def read_bytes(self, offset: int, count: int) -> np.ndarray:
        """Some of its bytes."""
        data = np.empty(count, dtype=np.uint8)
        read_exactly(self.file, self.start + offset, data)
        return data


class _Stream:
    """Reads numbers and strings; never more than the file has."""

    def __init__(self, stream: BinaryIO, size: int, where: str):
        self._stream, self._where = stream, where
        self._left = min(size, MAX_HEADER_BYTES)
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self._left:
            raise ConvertError(
                f"{self._where}: its header runs over the file's end: truncated or broken; fetch "
                "it again."
            )
        self._left -= count
        self.position += count
        return self._stream.read(count)

    def number(self, code: str) -> Any:
        """A number of a struct type."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        """A string: a length, then UTF-8."""
        data = self.take(self.number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ConvertError(f"{self._where}: its header holds text that is not UTF-8.") from None

    def value(self, kind: int) -> Any:
        """A value of a metadata type; a list for arrays."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise ConvertError(f"{self._where}: its header holds a value of type {kind}; unknown.")
        item, count = self.number("I"), self.number("Q")
        if count > MAX_ITEMS or item == ARRAY:
            raise ConvertError(f"{self._where}: its header holds a list of {count} values.")
        if item in SCALARS:
            code = SCALARS[item]
            data = self.take(count * struct.calcsize("<" + code))
            return list(struct.unpack(f"<{count}{code}", data))
        return [self.value(item) for _ in range(count)]


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """The metadata and the tensors of a file.

    Raises:
        ConvertError: It is not GGUF, is truncated or inconsistent, or holds a type that no
            converter here reads.
    """
    size = regular_file(file).st_size
    with file.open("rb") as raw:
        stream = _Stream(raw, size, str(file))
        if size < 24 or stream.take(4) != MAGIC:
            raise ConvertError(f"{file} is not a GGUF file.")
        version = stream.number("I")
        if version not in VERSIONS:
            raise ConvertError(
                f"{file} has GGUF version {version}; versions 2 and 3 (little-endian) are read."
            )
        tensor_count, value_count = stream.number("Q"), stream.number("Q")
        if max(tensor_count, value_count) > MAX_ITEMS:
            raise ConvertError(f"{file} announces {tensor_count} tensors, {value_count} values.")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = stream.string()
            if key in metadata:
                raise ConvertError(f"{file} has the key {key[:80]!r} twice.")
            metadata[key] = stream.value(stream.number("I"))
        entries = []
        for _ in range(tensor_count):
            name, count = stream.string(), stream.number("I")
            if not 1 <= count <= MAX_DIMENSIONS:
                raise ConvertError(f"{file}: tensor {name[:80]!r} has {count} dimensions.")
            shape = [stream.number("Q") for _ in range(count)]
            entries.append((name, shape, stream.number("I"), stream.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    good = isinstance(alignment, int) and 8 <= alignment <= 1 << 16
    if not good or alignment & (alignment - 1):
        raise ConvertError(f"{file} has the alignment {str(alignment)[:40]}.")
    data_start = -(-stream.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ConvertError(f"{file} holds the tensor {name[:80]!r} twice.")
        if offset % alignment:
            raise ConvertError(f"{file}: tensor {name[:80]!r} is not aligned.")
        tensors[name] = _tensor(file, size, name, shape, kind, data_start + offset)
    _check_overlaps(file, tensors)
    return metadata, tensors


def _tensor(
    file: Path, size: int, name: str, shape: list[int], kind: int, start: int
) -> GGUFTensor:
    """One tensor, checked against the file's size."""
    where = f"{file}: tensor {name[:80]!r}"
    if kind not in TYPES:
        known = REFUSED.get(kind, f"number {kind}")
        raise ConvertError(
            f"{where} has the type {known}, which can't be read here; use a file in F16, Q8_0, "
            "Q4_0, TQ2_0 or I2_S, or the original checkpoint."
        )
    type_name, block, block_bytes = TYPES[kind]
    count = math.prod(shape)
    if not 0 < count < 1 << 40 or shape[0] % block:
        raise ConvertError(
            f"{where} has the shape {str(shape)[:80]}, which {type_name} can't have."
        )
    nbytes = count // block * block_bytes + (I2_S_TAIL if type_name == "I2_S" else 0)
    if start + nbytes > size:
        raise ConvertError(
            f"{where} ends at byte {start + nbytes} but the file has {size}: truncated; fetch it "
            "again."
        )
    reversed_shape = tuple(reversed(shape))
    return GGUFTensor(file, name, type_name, reversed_shape, start, nbytes, block, block_bytes)


def _check_overlaps(file: Path, tensors: dict[str, GGUFTensor]) -> None:
    """Refuse tensors that share bytes."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            raise ConvertError(f"{file}: tensor {tensor.name[:80]!r} overlaps another.")
        end = tensor.start + tensor.nbytes
