"""What the launchers share: small inputs made once, and shapes checked before each launch.

A kernel trusts its inputs: where a shape is wrong it reads past an array's end, and nothing says
so. So every launcher looks at the shapes of all its arrays first, which costs microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.system.chips import gpu_cores

from .backend import CUDA, METAL, backend

LEAST_ELEMENTS = 8  # smaller inputs reach a kernel as `constant` instead of `device` memory
SIMD = 32  # lanes of a simdgroup
# Simdgroups that a core of an Apple GPU, or a multiprocessor of an NVIDIA one, can have at a time,
# of a kernel that uses many registers.
SIMDGROUPS_OF_A_CORE = {METAL: 16, CUDA: 12}
# Cores of a GPU whose number is not known. Apple's: by the last letter of its architecture, of a
# phone, a plain chip, a Pro or Max, an Ultra. Too many only make shorter splits.
CORES = {"p": 6, "g": 10, "s": 40, "c": 40, "d": 80}
MULTIPROCESSORS = 100
# For kernels that compare values with a threshold: MLX's default today, and asked for by name, so
# that what they decide is the specification's whatever the default becomes. (CUDA: building.py.)
SAFE_MATH = {"math_mode": "safe"}


# How many times as many simdgroups to launch; what is fastest for a shape may have been measured.
_share: ContextVar[float] = ContextVar("share", default=1.0)


@contextmanager
def simdgroups_times(factor: float) -> Iterator[None]:
    """Let kernels cut their work for so many times as many simdgroups, while this lasts."""
    token = _share.set(factor)
    try:
        yield
    finally:
        _share.reset(token)


def gpu_simdgroups() -> int:
    """Simdgroups that keep this GPU busy."""
    return max(1, int(_own_simdgroups() * _share.get()))


@cache
def _own_simdgroups() -> int:
    cores, of = gpu_cores(), backend() or METAL
    if cores is None and of == CUDA:
        cores = MULTIPROCESSORS
    if cores is None:
        architecture = str(mx.device_info().get("architecture", ""))
        cores = CORES.get(architecture[-1:], CORES["g"])
    return cores * SIMDGROUPS_OF_A_CORE[of]


@lru_cache(maxsize=64)
def constant(values: Any, dtype: mx.Dtype) -> mx.array:
    """A number, or (nested) tuple of them, on the device: uploaded once, not at each launch."""
    return mx.array(values, dtype)


@lru_cache(maxsize=16)
def filler(dtype: mx.Dtype) -> mx.array:
    """What stands for an input that a kernel does not look at, [LEAST_ELEMENTS]."""
    return mx.array([0] * LEAST_ELEMENTS, dtype)  # unlike mx.zeros there at once, for all threads


def table(values: np.ndarray) -> mx.array:
    """Numbers as a row, long enough to be `device` memory; there at once, for all threads."""
    flat = values.reshape(-1)
    return mx.array(np.pad(flat, (0, max(0, LEAST_ELEMENTS - flat.size))))


def padded(array: mx.array) -> mx.array:
    """The array as a row, long enough to be `device` memory."""
    flat = array.reshape(-1)
    if flat.size >= LEAST_ELEMENTS:
        return flat
    return mx.concatenate([flat, mx.zeros(LEAST_ELEMENTS - flat.size, flat.dtype)])


def check_shapes(
    kernel: str,
    arrays: Mapping[str, tuple[mx.array | None, Sequence[int | None] | None]],
    types: Mapping[str, mx.Dtype | None] | None = None,
) -> None:
    """Refuse arrays of other shapes or types than a kernel takes.

    Args:
        kernel: Its name, for the message.
        arrays: For each name the array and the shape that it must have, ``None`` in it for any
            size; ``None`` for both: there must be none.
        types: Types that arrays must have.

    Raises:
        ValueError: One of them does not fit; the message names it.
    """
    for name, (array, shape) in arrays.items():
        if array is None or shape is None:
            if array is not None or shape is not None:
                wanted = "no" if shape is None else f"{_written(shape)}"
                raise ValueError(f"[{kernel}] takes {wanted} {name} here but got {array!r}.")
            continue
        got = array.shape
        if len(got) != len(shape) or any(
            wanted is not None and size != wanted for size, wanted in zip(got, shape, strict=True)
        ):
            raise ValueError(
                f"[{kernel}] {name} must have shape {_written(shape)} but have {tuple(got)}."
            )
    for name, dtype in (types or {}).items():
        array = arrays[name][0]
        if array is not None and dtype is not None and array.dtype != dtype:
            raise ValueError(f"[{kernel}] {name} must be {dtype} but are {array.dtype}.")


def _written(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
