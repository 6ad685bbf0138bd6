"""A compiled kernel's launch over its buffers, with what went wrong as one error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from . import toolchain
from .arrays import to_array
from .errors import KernelFault
from .launch import Memory, Traffic, launch


class Outputs(list[mx.array]):
    """A kernel's outputs, as the kernel itself would return them, and what the bench saw.

    Attributes:
        traffic: By buffer, the bytes loaded and stored. Counted in checked mode only.
        threadgroup_bytes: Threadgroup memory in use.
    """

    def __init__(
        self, arrays: Sequence[mx.array], traffic: dict[str, Traffic], threadgroup_bytes: int
    ) -> None:
        super().__init__(arrays)
        self.traffic = traffic
        self.threadgroup_bytes = threadgroup_bytes


def execute(
    compiler: toolchain.Compiler,
    library: Path,
    source: str,
    memories: Sequence[Memory],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    checked: bool = False,
    seed: int = 0,
    divergent_simd: bool = False,
    allow_unwritten: bool = False,
    timeout_s: float = 60.0,
) -> Outputs:
    """Run a compiled kernel once.

    Args:
        compiler: What compiled it.
        library: The kernel.
        source: What it was compiled from, whose lines diagnoses name.
        memories: Its buffers, in order.
        output_shapes: Of those of them that are outputs.
        output_dtypes: Likewise.
        grid: In threads.
        threadgroup: Likewise.
        checked: Whether it was compiled to have every access followed.
        seed: As for :meth:`MetalBench.run`, and so are the rest.
        divergent_simd: See there.
        allow_unwritten: See there.
        timeout_s: See there.

    Raises:
        KernelFault: It did something that a GPU leaves undefined.
    """
    result = launch(
        toolchain.build_runtime(compiler),
        library,
        memories,
        grid=grid,
        threadgroup=threadgroup,
        seed=seed,
        checked=checked,
        divergent_simd=divergent_simd,
        timeout_s=timeout_s,
    )
    ignored = {"output not written"} if allow_unwritten else set()
    problems = [d.describe(source) for d in result.diagnoses if d.kind not in ignored]
    problems += [
        f"out-of-bounds access: byte {m.overrun} of '{m.name}' was written"
        for m in memories
        if m.overrun is not None
    ]
    if problems:
        raise KernelFault(problems)
    outputs = [m for m in memories if m.is_output]
    return Outputs(
        [
            to_array(m.data, tuple(shape), dtype)
            for m, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ],
        {m.name: m.traffic for m in memories} if checked else {},
        result.threadgroup_bytes,
    )
