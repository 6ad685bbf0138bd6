"""Ternary weights read a few rows at a time; whole ones are ``mlx_delta.ternary.codes``'s.

A code is value + 1, so 0, 1 or 2; code 3 has no meaning and marks a broken or foreign file.
"""

from __future__ import annotations

import numpy as np

from .errors import ConvertError


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
