"""Kernels as they are called: the first launch of each variant is waited for.

MLX compiles a kernel when its result is computed, long after it was asked for. What the compiler
refuses, or asks for more threads or memory than the GPU has, would then end a prompt in the middle;
here it is known at once, by name, and whoever asked can do without the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .cuda_text import MOST_BLOCKS

# In MLX's words for memory that ran out; unlike what a threadgroup may have, no fault of a kernel.
NO_MEMORY = ("allocate", "insufficient memory", "out of memory")


class KernelRefusedError(RuntimeError):
    """This machine does not run a kernel.

    Attributes:
        kernel: Its name.
        reason: In the compiler's words.
    """

    def __init__(self, kernel: str, reason: str):
        super().__init__(f"[{kernel}] does not run here: {reason}.")
        self.kernel, self.reason = kernel, reason


class Launched:
    """A kernel of MLX's, called as that is.

    Args:
        name: Of the kernel.
        kernel: What MLX made.
    """

    def __init__(self, name: str, kernel: Any) -> None:
        self.name, self.kernel = name, kernel
        self._compiled: set[tuple[Any, ...]] = set()

    def __call__(
        self, *, inputs: Sequence[Any], template: Sequence[Any] = (), **call: Any
    ) -> list[mx.array]:
        """Launch it.

        Args:
            inputs: Arrays or numbers.
            template: What it is compiled for.
            **call: What MLX's kernels take besides.

        Raises:
            KernelRefusedError: It was compiled for the first time, in vain.
        """
        # CUDA's kernels have another source where a grid is folded.
        variant = (*template, max(call.get("grid", (1,))[1:], default=1) > MOST_BLOCKS)
        if variant in self._compiled:
            outputs: list[mx.array] = self.kernel(inputs=inputs, template=list(template), **call)
            return outputs
        ready = _computed([x for x in inputs if isinstance(x, mx.array)])
        try:
            outputs = self.kernel(inputs=inputs, template=list(template), **call)
            if ready:
                mx.eval(outputs)
                self._compiled.add(variant)
        except (RuntimeError, ValueError) as error:
            if is_no_memory(error):
                raise
            raise KernelRefusedError(self.name, _telling(error)) from error
        return outputs


def is_no_memory(error: Exception) -> bool:
    """Whether MLX says that memory ran out."""
    return any(words in str(error).lower() for words in NO_MEMORY)


def _computed(inputs: list[mx.array]) -> bool:
    """Whether inputs could be computed; not so in a function that MLX traces."""
    try:
        mx.eval(inputs)
    except (RuntimeError, ValueError):
        return False  # if it was their own fault, it is found again
    return True


def _telling(error: Exception) -> str:
    """The line of a message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if "error" in line.lower()), " ".join(lines[:1]))
    return telling[:300].rstrip(".") or type(error).__name__
