"""Kernels are tried on a machine before they are trusted there.

The first time that a form of a kernel is asked for, it is run beside the operations that do the
same, and both results are compared. What the machine's compiler refuses, what asks for more than
its GPU has, and what comes out otherwise is left out from then on: the operations do it, and a
warning says so once. It costs one pass of operations for each kernel in a process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

# What counts as the same number, where it is no whole one: within this share of the largest of its
# channel, or of what is in the middle of all. Sums of a few bfloat16 numbers err by a third of it.
CLOSE = 0.1
# What share of numbers may be others all the same: a last bit decides a code or a cut now and then.
OTHERS = 0.02
# In MLX's words for memory that ran out; unlike what a threadgroup may have, that is no fault.
NO_MEMORY = ("allocate", "insufficient memory", "out of memory")

Result = TypeVar("Result")

# For each form that was tried whether it is right here.
_right: dict[tuple[Hashable, ...], bool] = {}


def proven(
    form: tuple[Hashable, ...],
    inputs: Sequence[mx.array],
    kernel: Callable[[], Result],
    operations: Callable[[], Result],
    numbers: Callable[[Result], Sequence[mx.array]],
) -> Result:
    """What a kernel gives, if it is right on this machine; else what operations give.

    Args:
        form: The kernel's name, and what else decides how it is compiled.
        inputs: What it reads. Where they can't be computed yet, in a function that MLX traces, it
            is used untried.
        kernel: Launches it.
        operations: Do the same.
        numbers: The numbers to compare, of what either of them gives.
    """
    right = _right.get(form)
    if right is not None:
        return kernel() if right else operations()
    found = kernel()
    try:
        mx.eval(list(inputs))
    except (RuntimeError, ValueError):
        return found  # nothing can be said of the kernel
    expected = operations()
    try:
        mx.eval(list(numbers(expected)))
    except RuntimeError:  # no memory: the kernel needs less
        _right[form] = True
        return found
    reason = _fault(lambda: numbers(found), numbers(expected))
    _right[form] = reason is None
    if reason is None:
        return found
    warnings.warn(
        f"[kernels] {form[0]} is left out on this machine, and MLX's operations do its work: "
        f"{reason}. Answers are right, and may come slower.",
        stacklevel=2,
    )
    return expected


def _fault(numbers: Callable[[], Sequence[mx.array]], expected: Sequence[mx.array]) -> str | None:
    """What is wrong with a kernel's numbers; ``None``: nothing.

    Raises:
        RuntimeError: There is no memory for it, and for operations there would be less.
    """
    try:
        found = list(numbers())
        mx.eval(found)
    except (RuntimeError, ValueError) as error:
        if any(words in str(error).lower() for words in NO_MEMORY):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = next((line for line in lines if "error" in line.lower()), " ".join(lines[:1]))
        return telling[:300].rstrip(".") or type(error).__name__
    for own, right in zip(found, expected, strict=True):
        share = _others(own, right)
        if share > OTHERS:
            return f"{share:.0%} of its numbers are others than theirs"
    return None


def _others(found: mx.array, expected: mx.array) -> float:
    """The share of numbers that are not close to those expected, of one shape."""
    if not expected.size:
        return 0.0
    if not mx.issubdtype(expected.dtype, mx.floating):
        return float(np.array(found != expected).mean())
    a, b = (np.array(x.astype(mx.float32)) for x in (found, expected))
    finite = np.isfinite(b)
    size = np.where(finite, np.abs(b), 0).reshape(-1, b.shape[-1])
    with np.errstate(all="ignore"):
        room = CLOSE * np.maximum(size.max(axis=0), np.median(size))
        other = np.where(finite, ~(np.abs(a - b) <= room), np.isfinite(a))
    return float(other.mean())


def itself(result: Any) -> list[mx.array]:
    """The numbers of a result that is one array."""
    return [result]
