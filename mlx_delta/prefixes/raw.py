"""Arrays of a cache as NumPy's, bit for bit: host memory, of no stream and no thread."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Piece = dict[str, np.ndarray]

# NumPy has no bfloat16: its bits are kept as whole numbers.
_AS_BITS = {"bfloat16": (mx.uint16, mx.bfloat16)}


def type_name(array: mx.array) -> str:
    """The name of an array's type."""
    return str(array.dtype).removeprefix("mlx.core.")


def to_raw(array: mx.array) -> np.ndarray:
    """An array's bits; a copy, or a view of what is not written again."""
    bits = _AS_BITS.get(type_name(array))
    return np.array(array if bits is None else array.view(bits[0]), copy=False)


def from_raw(array: np.ndarray, name: str) -> mx.array:
    """The array of these bits and of the type of that name."""
    made = mx.array(np.asarray(array, order="C"))
    bits = _AS_BITS.get(name)
    if bits is not None:
        return made.view(bits[1])
    if type_name(made) != name:
        raise ValueError(f"an array is of type {type_name(made)}, not {name}")
    return made


def piece_nbytes(piece: Piece) -> int:
    """Bytes of all its arrays."""
    return sum(array.nbytes for array in piece.values())


def padded(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The array with zeros behind it on one axis."""
    room: list[Any] = [(0, 0)] * array.ndim
    room[axis] = (0, size - array.shape[axis])
    return np.pad(array, room)


def no_tokens(shape: tuple[int, ...], name: str) -> np.ndarray:
    """An empty array as the bits of a type."""
    return np.zeros(shape, np.uint16 if name in _AS_BITS else name)
