"""Ternary weights: the packings they come in, and the two they leave in.

A code is value + 1, so 0, 1 or 2; code 3 has no meaning and marks a broken or foreign file.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .errors import ConvertError

# BitNet's own guard against a tensor of zeros (transformers, integrations/bitnet.py).
LEAST_MEAN = 1e-5


def check_codes(codes: np.ndarray, name: str, hint: str = "") -> np.ndarray:
    """Return the codes, having checked that none is 3.

    Raises:
        ConvertError: One is.
    """
    if codes.size and int(codes.max()) > 2:
        raise ConvertError(
            f"tensor {name} holds the ternary code 3, which means nothing: the file is broken or "
            f"packed in another layout.{hint}"
        )
    return codes


def unpack_u8_rows(read: object, rows: int, start: int, stop: int) -> np.ndarray:
    """Codes [stop - start, in] of rows start..stop of Hugging Face's packing.

    Bits 2k and 2k + 1 of byte (r, c) hold row r + k * rows / 4 (``pack_weights`` in
    transformers, integrations/bitnet.py).

    Args:
        read: ``read(a, b)`` gives the packed rows a..b, uint8 [b - a, in].
        rows: Rows of the unpacked tensor, a multiple of 4.
        start: First row.
        stop: Row after the last.
    """
    assert callable(read)
    quarter = rows // 4
    parts = []
    for k in range(4):
        first, last = max(start, k * quarter), min(stop, (k + 1) * quarter)
        if first < last:
            packed = read(first - k * quarter, last - k * quarter)
            parts.append((packed >> (2 * k)) & 3)
    return np.concatenate(parts)


def pack_u8(quarters: list[np.ndarray]) -> np.ndarray:
    """The reverse: packed rows from the codes of the same rows of each of the four quarters."""
    packed = quarters[0].copy()
    for k in (1, 2, 3):
        packed |= quarters[k] << (2 * k)
    return packed


def pack_affine(codes: np.ndarray) -> np.ndarray:
    """Codes [rows, in] as MLX's 2-bit quantization: uint32 [rows, in / 16], low bits first.

    With scales s and biases -s, ``mx.dequantize`` gives (code - 1) * s exactly. (``mx.quantize``
    with two bits would place four levels between the extremes and miss by s / 2.)
    """
    pairs = codes[:, 0::2] | (codes[:, 1::2] << 2)
    packed = pairs[:, 0::2] | (pairs[:, 1::2] << 4)
    return np.ascontiguousarray(packed).view("<u4")


def ternarize(values: mx.array, mean: float) -> np.ndarray:
    """Codes of full-precision BitNet weights, as the model itself rounds them.

    t = clip(round(W / mean), -1, 1), rounding halves to even, in float32 (``WeightQuant`` in
    transformers, integrations/bitnet.py; BitNet b1.58, arXiv 2402.17764).
    """
    scale = np.float32(1.0) / np.float32(mean)
    codes = mx.clip(mx.round(values.astype(mx.float32) * float(scale)), -1, 1) + 1
    return np.array(codes.astype(mx.uint8))
