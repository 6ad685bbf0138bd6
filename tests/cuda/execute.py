"""Runs what MLX would give NVIDIA's compiler on the CPU, thread by thread, as the bench runs Metal.

The text is the one for CUDA, with ``kernels/cuda.h`` and the words that take Metal's places; the
words of CUDA itself are the bench's (``metal_cpu/runtime/cuda``). What NVIDIA's compiler and a GPU
make of it is not modelled.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import mlx.core as mx

from mlx_delta.ops.metal_text import rewrite_threadgroup

from ..metal_cpu import MetalBench, toolchain
from ..metal_cpu.arrays import to_bytes
from ..metal_cpu.launch import Memory, Placement, poison
from ..metal_cpu.rewrite import bind_to_runtime
from ..metal_cpu.running import execute
from .generated import MOST_DIMENSIONS, CudaArguments, Generated, Launch
from .nvcc import STAND_INS

HEADER = "cuda/execute.h"
_INCLUDES = re.compile(r"^\s*#(include|pragma once).*$", re.MULTILINE)


def launch_on(
    bench: MetalBench, mode: Literal["fast", "checked"] = "fast", placement: Placement = "end"
) -> Launch:
    """Launches that run on the bench; options as for :meth:`MetalBench.run`."""

    def launch(kernel: CudaArguments, text: Generated, call: dict[str, Any]) -> list[mx.array]:
        unit = translation_unit(text)
        library = toolchain.build_kernel(bench.compiler, unit, mode == "checked", [HEADER])
        return execute(
            bench.compiler,
            library,
            unit,
            memories(text, call, placement),
            call["output_shapes"],
            call["output_dtypes"],
            grid=call["grid"],
            threadgroup=call["threadgroup"],
            checked=mode == "checked",
            allow_unwritten=True,
        )

    return launch


def translation_unit(generated: Generated) -> str:
    """C++ that defines the kernel and an entry point with a plain C signature."""
    headers = sorted(file for file in STAND_INS.rglob("*") if file.is_file())
    header = "".join(file.read_text(encoding="utf-8") for file in headers)
    text = _INCLUDES.sub("", generated.text)
    text = re.sub(r'_Pragma\("unroll[^"]*"\)', "", text)  # costs seconds of compiling
    text = rewrite_threadgroup(text, lambda words: bind_to_runtime(words, ""), "__shared__")
    arguments = []
    for i, parameter in enumerate(generated.parameters):
        kind = parameter.type if parameter.is_array else f"mlx::core::cu::{parameter.type}"
        kind = "int" if parameter.type == "int" else kind
        pointer = f"({'' if parameter.is_output else 'const '}{kind}*)buffers[{i}]"
        arguments.append(pointer if parameter.is_array else f"*{pointer}")
    return "\n".join(
        [
            f'#include "{HEADER}"',
            _INCLUDES.sub("", header),
            '#line 1 "kernel.metal"',
            text,
            '#line 1 "entry"',
            'extern "C" void mcpu_entry(void** buffers, ThreadAttributes*) {',
            f"  {generated.function}({', '.join(arguments)});",
            "}\n",
        ]
    )


def memories(generated: Generated, call: dict[str, Any], placement: Placement) -> list[Memory]:
    """What each of the function's parameters is, in order."""
    inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in call["inputs"]]
    result = []
    for parameter in generated.parameters:
        if parameter.is_output:
            shape, dtype = (call[x][parameter.of] for x in ("output_shapes", "output_dtypes"))
            initial = call["init_value"]
            data = poison(math.prod(shape) * dtype.size)
            if initial is not None:
                data = to_bytes(mx.full(shape, initial, dtype))
            result.append(
                Memory(parameter.name, data, dtype.size, True, is_initialised=initial is not None)
            )
            continue
        array, where = inputs[parameter.of], placement
        if not parameter.is_array:
            array, where = _numbers(parameter.type, array.shape), "end"
        result.append(
            Memory(parameter.name, to_bytes(array), array.dtype.size, False, placement=where)
        )
    return result


def _numbers(kind: str, shape: tuple[int, ...]) -> mx.array:
    if kind == "int":
        return mx.array(len(shape), mx.int32)
    unused = [0] * (MOST_DIMENSIONS - len(shape))
    if kind == "Shape":
        return mx.array([*shape, *unused], mx.int32)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return mx.array([*strides, *unused], mx.int64)
