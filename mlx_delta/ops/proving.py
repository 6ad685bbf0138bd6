"""Kernels are tried on a machine before they are trusted there.

Before a process first uses a kernel for a type and dimensions, it is run on an input made up for
it, and its result is compared with that of the operations that do the same. What comes out
otherwise is left out, and so is what this machine does not compile (``launched.py``): the
operations do it from then on, and a warning says so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig

from .launched import KernelRefusedError

# How far a right result may be from that of operations, of its own size, by root mean square: both
# round, and a last bit decides a code or a cut now and then.
ROOM = 0.05
TRIED_BLOCKS = 3  # without sinks: a first one, a last one and one between
ALIKE = 8  # made-up tokens in a row share something

Input = TypeVar("Input")
Result = TypeVar("Result")

_tried: set[tuple[Hashable, ...]] = set()
_left_out: set[str] = set()


def proven(
    form: tuple[Hashable, ...],
    x: Input,
    kernel: Callable[[Input], Result],
    operations: Callable[[Input], Result],
    numbers: Callable[[Result], Sequence[mx.array]],
    make_up: Callable[[], Input],
) -> Result:
    """What a kernel gives of an input, if it is right on this machine; else what operations give.

    Args:
        form: The kernel's name, and the types and dimensions that it is tried for.
        x: The input.
        kernel: Launches it.
        operations: Do the same.
        numbers: The numbers to compare, of what either of them gives.
        make_up: Another input, on which all that can go wrong shows.
    """
    name = str(form[0])
    if name in _left_out:
        return operations(x)
    try:
        if form not in _tried:
            reason = _fault(make_up(), kernel, operations, numbers)
            if reason is not None:
                raise KernelRefusedError(name, reason)
            _tried.add(form)
        return kernel(x)
    except KernelRefusedError as error:
        _left_out.add(name)
        warnings.warn(
            f"[kernels] {name} is left out on this machine, and MLX's operations do its work, "
            f"which may take longer: {error.reason}.",
            stacklevel=2,
        )
        return operations(x)


def _fault(
    x: Any,
    kernel: Callable[[Any], Any],
    operations: Callable[[Any], Any],
    numbers: Callable[[Any], Sequence[mx.array]],
) -> str | None:
    """What is wrong with a kernel's numbers of an input; ``None``: nothing."""
    found, expected = (_floats(numbers(give(x))) for give in (kernel, operations))
    for own, right in zip(found, expected, strict=True):
        if not np.array_equal(np.isfinite(own), np.isfinite(right)):
            return "some of its numbers are not finite"
        apart, size = (np.sqrt(np.square(y).mean()) for y in (own - right, right))
        if apart > ROOM * size:
            return f"its numbers are others than theirs (by {apart / (size or 1):.2g})"
    return None


def _floats(numbers: Sequence[mx.array]) -> list[np.ndarray]:
    """As float64 of NumPy."""
    return [np.array(x.astype(mx.float32)).astype(np.float64) for x in numbers]


def kind_of(x: mx.array, size: int) -> tuple[Hashable, ...]:
    """What blocks [B, H, L, D] of so many tokens a kernel is tried for."""
    return x.dtype, x.shape[1], x.shape[3], size


def blocks_to_try(config: DeltaConfig) -> int:
    """Blocks of a setting of which some have no sinks."""
    return TRIED_BLOCKS + config.sinks // config.block_size


def tokens_like(x: mx.array, blocks: int, size: int) -> mx.array:
    """Made-up keys or values of the type and heads of others, neighbours alike.

    Args:
        x: [B, H, L, D].
        blocks: Whole blocks.
        size: Tokens of one.

    Returns:
        [2, H, blocks * size, D], of variance 1.
    """
    tokens = blocks * size
    shape = (2, x.shape[1], tokens + ALIKE - 1, x.shape[3])
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sums = noise[:, :, :tokens].copy()
    for i in range(1, ALIKE):
        sums += noise[:, :, i : i + tokens]
    return mx.array(sums / np.float32(np.sqrt(ALIKE))).astype(x.dtype)


def itself(result: mx.array) -> list[mx.array]:
    """The numbers of a result that is one array."""
    return [result]
