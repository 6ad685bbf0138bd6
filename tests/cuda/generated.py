"""What `mx.fast.cuda_kernel` makes of a kernel, said again here: MLX for CPUs has no CUDA.

It takes a body and writes the rest, as on Metal (``mlx/backend/cuda/custom_kernel.cpp``): a header
of its own, the kernel's, and within ``namespace mlx::core::cu`` a function with a pointer for each
array, behind it ``NAME_shape``, ``NAME_strides`` and ``NAME_ndim`` where the body has these words;
template arguments are constants at the top of the body. The grid is in threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

MOST_DIMENSIONS = 10  # of an array whose shape is handed over
MLX_HEADER = '#include "mlx/backend/cuda/device/utils.cuh"\n#include <cooperative_groups.h>\n'
_NAMESPACE = "mlx::core::cu"
_C_NAMES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
# What is handed over besides an array, by the word behind its name.
_BESIDE = {"_shape": "Shape", "_strides": "Strides", "_ndim": "int"}


@dataclass(frozen=True)
class Parameter:
    """Of the function: an array, or numbers of one.

    Attributes:
        name: As in the source.
        type: ``float``, or ``Shape`` and the like.
        of: The array's place among inputs and outputs.
        is_output: Whether the kernel writes it.
    """

    name: str
    type: str
    of: int
    is_output: bool

    @property
    def is_array(self) -> bool:
        return self.type in _C_NAMES.values()


@dataclass(frozen=True)
class Generated:
    """The text of a kernel for one combination of types and template arguments."""

    text: str
    function: str  # with its namespace
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class CudaArguments:
    """The arguments of ``mx.fast.cuda_kernel``, which take no others."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    shared_memory: int = 0

    def generate(
        self,
        inputs: Sequence[Any],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]],
    ) -> Generated:
        """The text for such inputs."""
        parameters: list[Parameter] = []
        for i, (name, array) in enumerate(zip(self.input_names, inputs, strict=True)):
            array = array if isinstance(array, mx.array) else mx.array(array)
            parameters.append(Parameter(name, _C_NAMES[array.dtype], i, False))
            for suffix, kind in _BESIDE.items():
                if array.ndim and name + suffix in self.source:
                    parameters.append(Parameter(name + suffix, kind, i, False))
        for i, (name, dtype) in enumerate(zip(self.output_names, output_dtypes, strict=True)):
            parameters.append(Parameter(name, _C_NAMES[dtype], i, True))
        name = f"custom_kernel_{self.name}{''.join(map(_part_of_name, template))}"
        lines = [MLX_HEADER, self.header, f"namespace {_NAMESPACE} {{"]
        lines += ["namespace cg = cooperative_groups;", f"__global__ void {name}("]
        lines.append(",\n".join(f"    {_declared(parameter)}" for parameter in parameters) + ") {")
        lines += [f"  {_constant(*argument)};" for argument in template]
        lines += [self.source, f"}}\n}}  // namespace {_NAMESPACE}\n"]
        return Generated("\n".join(lines), f"{_NAMESPACE}::{name}", tuple(parameters))


def _declared(parameter: Parameter) -> str:
    if not parameter.is_array:
        return f"const __grid_constant__ {parameter.type} {parameter.name}"
    return f"{'' if parameter.is_output else 'const '}{parameter.type}* {parameter.name}"


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {_C_NAMES[value]}"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    return f"constexpr int {name} = {value}"


def _part_of_name(argument: tuple[str, Any]) -> str:
    value = argument[1]
    if isinstance(value, bool):
        return "_t" if value else "_f"
    return "_" + re.sub(r"\W", "_", str(value).removeprefix("mlx.core."))


Launch = Callable[[CudaArguments, Generated, dict[str, Any]], list[mx.array]]


def fake_cuda_kernel(launch: Launch) -> Callable[..., Callable[..., list[mx.array]]]:
    """In the place of ``mx.fast.cuda_kernel``: takes what it takes, and refuses what it refuses.

    Args:
        launch: What a call does, given the kernel's arguments, its text, and the call's.
    """

    def build(**arguments: Any) -> Callable[..., list[mx.array]]:
        kernel = CudaArguments(**arguments)
        names = [*kernel.input_names, *kernel.output_names]
        if not kernel.output_names or len(set(names)) < len(names):
            raise ValueError(f"inputs and outputs {names}")

        def call(
            *,
            inputs: Sequence[Any],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            template: Sequence[tuple[str, Any]] | None = None,
            init_value: float | None = None,
            verbose: bool = False,
            stream: Any = None,
        ) -> list[mx.array]:
            for numbers in (grid, threadgroup):
                if not isinstance(numbers, tuple) or [type(n) for n in numbers] != [int] * 3:
                    raise TypeError(f"grid {grid!r} and threadgroup {threadgroup!r}")
            if len(output_shapes) != len(kernel.output_names):
                raise ValueError(f"{len(output_shapes)} shapes of {kernel.output_names}")
            blocks = [-(-n // m) for n, m in zip(grid, threadgroup, strict=True)]
            if max(blocks[1:]) > 65535 or max(grid) >= 1 << 31:
                raise ValueError(f"a grid of {blocks} blocks")
            given = list(template or [])
            if any(not isinstance(value, bool | int | mx.Dtype) for _, value in given):
                raise ValueError(f"template {given}")
            text = kernel.generate(inputs, output_dtypes, given)
            said = {"inputs": inputs, "output_shapes": output_shapes, "grid": grid}
            said |= {"output_dtypes": output_dtypes, "threadgroup": threadgroup}
            return launch(kernel, text, said | {"template": given, "init_value": init_value})

        return call

    return build
