"""From the Metal source that MLX generates for a kernel to one file of CUDA C++.

What differs is in ``kernels/cuda.h``; here only words are replaced, and the entry is written.
"""

from __future__ import annotations

import re

from mlx_delta.kernels import kernel_source

from ..metal_cpu.rewrite import is_code, rewrite_threadgroup, tokens
from ..metal_cpu.signature import GeneratedKernel

_WORDS = {"device": "", "constant": "", "thread": "", "inline": "METAL_INLINE"}
_GRID = "metal::uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y, blockIdx.z}"
_ATTRIBUTES = {
    "thread_index_in_threadgroup": "threadIdx.x",
    "thread_index_in_simdgroup": "threadIdx.x % 32",
    "simdgroup_index_in_threadgroup": "threadIdx.x / 32",
    "thread_position_in_grid": _GRID,
    "thread_position_in_threadgroup": "metal::uint3{threadIdx.x, 0, 0}",
    "threadgroup_position_in_grid": "metal::uint3{blockIdx.x, blockIdx.y, blockIdx.z}",
    "threadgroups_per_grid": "metal::uint3{gridDim.x, gridDim.y, gridDim.z}",
    "threads_per_threadgroup": "metal::uint3{blockDim.x, 1, 1}",
}


def cuda_source(generated: GeneratedKernel, entry: str) -> str:
    """CUDA C++ of a kernel, whose ``__global__`` function is called ``entry``.

    Raises:
        ValueError: The kernel asks for a thread attribute that is not known here.
    """
    unknown = set(generated.attributes) - set(_ATTRIBUTES)
    if unknown:
        raise ValueError(f"[cuda_source] there is no CUDA for {', '.join(sorted(unknown))}.")
    parameters, arguments = [], []
    for index, buffer in enumerate(generated.buffers):
        parameters.append(f"{'const ' if buffer.is_const else ''}{buffer.type}* b{index}")
        arguments.append(f"{'*' if buffer.is_reference else ''}b{index}")
    arguments += [_ATTRIBUTES[name] for name in generated.attributes]
    return "\n".join(
        [
            kernel_source("cuda.h"),
            "namespace metal {",
            _translated(generated.source),
            f"__global__ void {entry}({', '.join(parameters)}) {{",
            f"  {generated.function}({', '.join(arguments)});",
            "}\n}",
        ]
    )


def _translated(source: str) -> str:
    """Metal functions, the kernel among them, as functions that run on the device."""
    source = rewrite_threadgroup(source, lambda declaration: f"__shared__ {declaration};")
    source = source.replace("[[kernel]] void", "METAL_INLINE void")
    source = re.sub(r"\[\[[^\]]*\]\]", "", source)
    words = []
    for token in tokens(source):
        if token.lstrip().startswith("#"):
            token = "" if token.lstrip().startswith(("#include", "#pragma")) else token
        elif is_code(token):
            token = "" if token == "threadgroup" else _WORDS.get(token, token)
        words.append(token)
    return "".join(words).replace("using namespace metal;", "")
