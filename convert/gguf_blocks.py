"""GGUF's block formats: exact into MLX's quantization where there is one, else to float32.

Layouts: ggml-common.h and ggml-quants.c in https://github.com/ggml-org/ggml, and for I2_S
ggml-bitnet-mad.cpp in https://github.com/microsoft/BitNet. Reading values back from the formats
without an exact counterpart is left to the ``gguf`` package.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from .errors import ConvertError
from .ternary import check_codes
from .weights import Affine, Ternary

# Formats whose values MLX's affine quantization holds exactly: bits, and the group size.
AFFINE = {"Q4_0": (4, 32), "Q4_1": (4, 32), "Q8_0": (8, 32)}
TERNARY = ("TQ1_0", "TQ2_0", "I2_S")


def affine_rows(data: np.ndarray, kind: str, name: str) -> Affine:
    """Rows of Q4_0, Q4_1 or Q8_0 in MLX's quantization, bit for bit.

    Q4_0: w = d (q - 8); Q4_1: w = d q + m; Q8_0: w = d q with q from -128 to 127. The scales
    stay float16; a bias that float16 can't hold makes both float32.

    Args:
        data: uint8 [rows, bytes].
        kind: The format.
        name: For errors.
    """
    rows = len(data)
    block_bytes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = data.reshape(rows, -1, block_bytes)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    codes: np.ndarray
    if kind == "Q8_0":
        # int8 + 128 as uint8 flips the highest bit.
        codes = (blocks[..., 2:] ^ np.uint8(0x80)).reshape(rows, -1)
        words = np.ascontiguousarray(codes).view("<u4")
        biases = scales.astype(np.float32) * -128
    else:
        start = 2 if kind == "Q4_0" else 4
        nibbles = blocks[..., start:]
        # Byte j holds weight j low and weight j + 16 high; MLX wants neighbours in one byte.
        codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1).reshape(rows, -1)
        words = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view("<u4")
        if kind == "Q4_0":
            biases = scales.astype(np.float32) * -8
        else:
            minima = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
            biases = minima.astype(np.float32)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise ConvertError(f"tensor {name} holds a scale that is not finite; the file is broken.")
    with np.errstate(over="ignore"):
        half = biases.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), biases)
    parts = (scales, half) if exact else (scales.astype(np.float32), biases)
    return Affine(mx.array(words), mx.array(parts[0]), mx.array(parts[1]))


def ternary_rows(data: np.ndarray, kind: str, name: str) -> Ternary:
    """Rows of TQ1_0 or TQ2_0: codes and one scale for every 256 weights."""
    rows = len(data)
    codes: np.ndarray
    if kind == "TQ2_0":
        blocks = data.reshape(rows, -1, 66)
        lanes = blocks[..., :64].reshape(rows, -1, 2, 1, 32)
        shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 1, 4, 1)
        codes = ((lanes >> shifts) & 3).reshape(rows, -1)
    else:
        blocks = data.reshape(rows, -1, 54)
        powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8).reshape(1, 1, 5, 1)
        parts = []
        for first, last, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
            # A byte is a fraction in base 3: times 3^n modulo 256, its highest digit is the next.
            digit = blocks[:, :, None, first:last] * powers[:, :, :digits]
            parts.append(
                ((digit.astype(np.uint16) * 3) >> 8)
                .astype(np.uint8)
                .reshape(rows, blocks.shape[1], -1)
            )
        codes = np.concatenate(parts, axis=-1).reshape(rows, -1)
    scales = np.ascontiguousarray(blocks[..., -2:]).view(np.float16)[..., 0].astype(np.float32)
    if not np.isfinite(scales).all():
        raise ConvertError(f"tensor {name} holds a scale that is not finite; the file is broken.")
    return Ternary(check_codes(codes, name), scales)


def i2s_codes(data: np.ndarray, inputs: int, layout: str, name: str) -> np.ndarray:
    """Codes of I2_S, [rows, inputs].

    x86: 32 bytes hold 128 weights, weight j in byte j % 32 at shift 6 - 2 (j / 32). Builds for
    ARM have 16 bytes for 64 weights. The file does not say which.

    Args:
        data: uint8 [bytes] of whole blocks.
        inputs: Weights of a row.
        layout: ``x86`` or ``arm``.
        name: For errors.
    """
    lanes = {"x86": 32, "arm": 16}[layout]
    shifts = np.array([6, 4, 2, 0], dtype=np.uint8).reshape(1, 4, 1)
    codes = ((data.reshape(-1, 1, lanes) >> shifts) & 3).reshape(-1, inputs)
    return check_codes(codes, name, " Try --i2s-layout arm, and compare with the safetensors.")


def float_rows(data: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Rows of any other format as float32 [rows, in], through the ``gguf`` package."""
    try:
        values = dequantize(data, GGMLQuantizationType[kind])
    except (NotImplementedError, KeyError, ValueError) as error:
        raise ConvertError(f"tensor {name} of type {kind} can't be read: {error}.") from None
    if not np.isfinite(values).all():
        raise ConvertError(f"tensor {name} holds NaN or infinity; the file is broken.")
    return values
