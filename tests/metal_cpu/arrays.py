"""MLX arrays as the bytes that kernels see, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


def to_bytes(array: mx.array) -> bytes:
    """An array's elements in row-major order, which is how kernels see inputs by default."""
    if not array.size:
        return b""
    buffer: Any = mx.contiguous(array).reshape(-1).view(mx.uint8)  # MLX's types do not mention it
    return bytes(memoryview(buffer))


def to_array(data: bytes, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if not data:
        return mx.zeros(shape, dtype)
    buffer: Any = memoryview(data)
    return mx.array(buffer).view(dtype).reshape(shape)
