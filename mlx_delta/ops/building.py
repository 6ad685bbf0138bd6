"""The one function that makes the kernels, for whichever back-end there is.

A kernel is a header with its functions and a body that calls one, both in Metal. MLX writes the
signature around the body. With CUDA the same text goes to ``mx.fast.cuda_kernel``, in CUDA's words,
behind an object that is called as Metal's kernels are.

How MLX compiles them. Metal: when a kernel is first launched, by default in the safe math mode, in
which infinities and NaN mean what IEEE 754 says; kernels that compare values with a threshold ask
for it by name. CUDA: with NVRTC, for the GPU at hand, and without options of ours: fast-math is
off, so that division and square roots are rounded as IEEE says and subnormal numbers count, but a
product and the sum it goes into may become one operation that rounds once. Where a decision hangs
on the bits of such a sum, the source calls ``exact_product``, which CUDA keeps apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from .backend import CUDA, backend
from .cuda_text import GRID_INPUT, MOST_BLOCKS, POINTER_TO, cuda_body, cuda_header
from .launched import Launched
from .launching import SIMD, constant

_MOST_THREADS = 1024  # of a threadgroup


def make_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    compile_options: Mapping[str, str] | None = None,
) -> Launched:
    """A kernel for the back-end of this machine, to be called as Metal's are.

    Args:
        name: Of the kernel.
        input_names: In the order in which a call gives its inputs.
        output_names: Likewise.
        source: The body, in Metal.
        header: The functions it calls, in Metal.
        compile_options: As ``mx.fast.metal_kernel`` takes them; CUDA has none, and needs none.
    """
    if backend() == CUDA:
        return Launched(name, CudaKernel(name, input_names, output_names, source, header))
    kernel = mx.fast.metal_kernel(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
        compile_options=None if compile_options is None else dict(compile_options),
    )
    return Launched(name, kernel)


class CudaKernel:
    """A kernel in Metal's words, as one or more of CUDA's.

    More than one, because inputs that are numbers are read through pointers, and which are is known
    when it is called; and because a grid with many threadgroups in y or z becomes one long row.
    Its arguments are those of :func:`make_kernel`.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str,
    ) -> None:
        self.name = name
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.source, self.header = source, cuda_header(header)
        self._kernels: dict[tuple[tuple[bool, ...], bool], Any] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        **call: Any,
    ) -> list[mx.array]:
        """Launch it.

        Args:
            inputs: Arrays, NumPy's too, or numbers.
            grid: In threads, as on Metal.
            threadgroup: A row of whole simdgroups, of which the grid is a multiple.
            **call: What MLX's kernels take besides.

        Raises:
            ValueError: A grid or threadgroup that Metal would take and CUDA would not.
        """
        threads, groups = threadgroup[0], grid[0] // max(1, threadgroup[0])
        total = grid[0] * grid[1] * grid[2]
        if (
            tuple(threadgroup[1:]) != (1, 1)
            or threads % SIMD
            or not 0 < threads <= _MOST_THREADS
            or grid[0] != groups * threads
            or not 0 < total < 1 << 31
        ):
            raise ValueError(
                f"[{self.name}] CUDA takes threadgroups of one row of up to {_MOST_THREADS} "
                f"threads, in multiples of {SIMD}, and a grid of whole ones of fewer than 2^31 "
                f"threads, but got {threadgroup} and {grid}."
            )
        scalars = tuple(getattr(x, "ndim", 0) == 0 for x in inputs)
        folded = max(grid[1:]) > MOST_BLOCKS
        kernel = self._kernels.get((scalars, folded))
        if kernel is None:
            kernel = self._kernels[scalars, folded] = self._build(scalars, folded)
        if folded:
            inputs = [*inputs, constant((groups, *grid[1:]), mx.int32)]
            grid = (total, 1, 1)
        outputs: list[mx.array] = kernel(
            inputs=list(inputs), grid=grid, threadgroup=threadgroup, **call
        )
        return outputs

    def _build(self, scalars: tuple[bool, ...], folded: bool) -> Any:
        pairs = list(zip(self.input_names, scalars, strict=True))
        names = [POINTER_TO + name if is_scalar else name for name, is_scalar in pairs]
        return mx.fast.cuda_kernel(
            name=self.name + ("_folded" if folded else ""),
            input_names=[*names, *([GRID_INPUT] if folded else [])],
            output_names=self.output_names,
            source=cuda_body(self.source, [name for name, scalar in pairs if scalar], folded),
            header=self.header,
        )
