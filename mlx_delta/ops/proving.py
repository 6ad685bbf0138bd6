"""Kernels are tried on a machine before they are trusted there.

Before a process first uses a kernel for keys of a type and dimension, its result is compared with
that of the operations that do the same: what stores keys and values, on a few blocks made up for
it; attention, on the text at hand while that is short. What comes out otherwise is left out, and so
is what this machine does not compile (``launched.py``): the operations do it from then on, and a
warning says so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .launched import KernelRefusedError, is_no_memory

# How far a right result may be from that of operations, of its own size, by root mean square. Of
# made-up blocks: a last bit decides a code or a cut now and then. Of a text: both round, and where
# keys are much larger than what tells them apart, operations in bfloat16 err by a fifth.
OF_BLOCKS, OF_A_TEXT = 0.05, 0.5
# Tokens of a text beyond which attention is not compared: operations take nine times what its keys
# and values do in full.
LONGEST = 4096
TRIED_BLOCKS = 2
ALIKE = 8  # of these, so many tokens share something

Result = TypeVar("Result")
Numbers = Callable[[Any], Sequence[mx.array]]

_tried: set[tuple[Hashable, ...]] = set()
_left_out: set[str] = set()


def proven(
    name: str,
    x: mx.array,
    kernel: Callable[[mx.array], Result],
    operations: Callable[[mx.array], Result],
    numbers: Numbers,
    size: int | None = None,
    tokens: int = 0,
) -> Result:
    """What a kernel gives of an input, if it is right on this machine; else what operations give.

    Args:
        name: Of the kernel.
        x: The input, [.., D].
        kernel: Launches it.
        operations: Do the same.
        numbers: The numbers to compare, of what either of them gives.
        size: Tokens of a block, where x are whole blocks of keys or values [B, Hkv, L, D] and
            others may be made up; ``None``: it is compared on this input.
        tokens: Of the text that is attended to.
    """
    if name in _left_out:
        return operations(x)
    form = (name, x.dtype, x.shape[-1], size)
    if form not in _tried and tokens <= LONGEST and _can_be_tried(x):
        sample, room = (x, OF_A_TEXT) if size is None else (_made_up(x, size), OF_BLOCKS)
        if (reason := _fault(sample, kernel, operations, numbers, room)) is not None:
            return _without(name, reason, x, operations)
        _tried.add(form)
    try:
        return kernel(x)
    except KernelRefusedError as error:
        return _without(name, error.reason, x, operations)


def _without(
    name: str, reason: str, x: mx.array, operations: Callable[[mx.array], Result]
) -> Result:
    """What operations give, from now on."""
    _left_out.add(name)
    warnings.warn(
        f"[kernels] {name} is left out on this machine, and MLX's operations do its work, which "
        f"may take longer: {reason}.",
        stacklevel=3,
    )
    return operations(x)


def _can_be_tried(x: mx.array) -> bool:
    """Whether an input is finite, and can be computed: not so in a function that MLX traces."""
    try:
        return bool(mx.isfinite(x).all().item())
    except (RuntimeError, ValueError):
        return False


def _made_up(x: mx.array, size: int) -> mx.array:
    """Blocks of the type and heads of others, [1, Hkv, blocks * size, D], alike along the text."""
    tokens = TRIED_BLOCKS * size
    noise = np.random.default_rng(0).normal(size=(1, x.shape[1], tokens + ALIKE - 1, x.shape[3]))
    sums = sum(noise[:, :, i : i + tokens] for i in range(ALIKE)) / np.sqrt(ALIKE)
    return mx.array(np.asarray(sums, np.float32)).astype(x.dtype)


def _fault(
    x: mx.array,
    kernel: Callable[[mx.array], Any],
    operations: Callable[[mx.array], Any],
    numbers: Numbers,
    room: float,
) -> str | None:
    """What is wrong with a kernel's numbers of an input; ``None``: nothing."""
    try:
        found = _floats(numbers(kernel(x)))
        expected = _floats(numbers(operations(x)))
    except KernelRefusedError as error:
        return error.reason
    except RuntimeError as error:
        if is_no_memory(error):
            return None  # whoever asked for the kernel finds it again
        raise
    for own, right in zip(found, expected, strict=True):
        if not np.array_equal(np.isfinite(own), np.isfinite(right)):
            return "some of its numbers are not finite, or should not be"
        apart, all_of_it = (
            np.sqrt(np.square(y, where=np.isfinite(y), out=np.zeros_like(y)).mean())
            for y in (own - right, right)
        )
        if apart > room * all_of_it:
            return f"its numbers are others than theirs (by {apart / (all_of_it or 1):.2g})"
    return None


def _floats(numbers: Sequence[mx.array]) -> list[np.ndarray]:
    """As float64 of NumPy."""
    return [np.array(x.astype(mx.float32)).astype(np.float64) for x in numbers]


def itself(result: mx.array) -> list[mx.array]:
    """The numbers of a result that is one array."""
    return [result]
