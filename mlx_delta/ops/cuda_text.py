"""From Metal's words to CUDA's: a kernel's functions and body, as `cuda_kernel` takes them.

What differs in meaning is in ``kernels/cuda.h``; here only words are replaced. MLX writes the
signature, as it does on Metal, but with plain pointers for all inputs and without thread
attributes: those that a body names are declared in front of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_delta.kernels import kernel_source

from .metal_text import is_code, rewrite_threadgroup, tokens

# Blocks of a grid in y and z; in x there may be 2^31.
MOST_BLOCKS = 65535
# The input that says how many threadgroups there are each way, of a grid that does not fit that.
GRID_INPUT = "metal_grid"
# A number as an input is a pointer to it, of a name of its own; the body's name is for the number.
POINTER_TO = "pointer_to_"

_WORDS = {"device": "", "constant": "", "thread": "", "threadgroup": "", "inline": "METAL_INLINE"}
_GROUP = "threadgroup_position_in_grid"
_GROUPS = "threadgroups_per_grid"
_PLAIN = {
    _GROUP: "{blockIdx.x, blockIdx.y, blockIdx.z}",
    _GROUPS: "{gridDim.x, gridDim.y, gridDim.z}",
}
_FOLDED = {
    _GROUPS: f"{{uint({GRID_INPUT}[0]), uint({GRID_INPUT}[1]), uint({GRID_INPUT}[2])}}",
    _GROUP: f"{{blockIdx.x % {_GROUPS}.x, blockIdx.x / {_GROUPS}.x % {_GROUPS}.y, "
    f"blockIdx.x / {_GROUPS}.x / {_GROUPS}.y}}",
}
# Threadgroups are a row of threads: building.py refuses others.
_ATTRIBUTES = {
    "thread_index_in_threadgroup": "threadIdx.x",
    "thread_index_in_simdgroup": "threadIdx.x % 32",
    "simdgroup_index_in_threadgroup": "threadIdx.x / 32",
    "simdgroups_per_threadgroup": "blockDim.x / 32",
    "thread_position_in_threadgroup": "{threadIdx.x, 0, 0}",
    "threads_per_threadgroup": "{blockDim.x, 1, 1}",
    "thread_position_in_grid": f"{{{_GROUP}.x * blockDim.x + threadIdx.x, {_GROUP}.y, {_GROUP}.z}}",
}


def cuda_header(header: str) -> str:
    """What stands before the kernel: Metal's words, and a kernel's functions in their namespace."""
    words = kernel_source("cuda.h")
    return f"{words}\nnamespace metal {{\n{translated(header)}\n}}  // namespace metal\n"


def cuda_body(body: str, scalars: Sequence[str], folded: bool) -> str:
    """The kernel's body, for inputs of which some are numbers.

    Args:
        body: Metal.
        scalars: Inputs that are numbers; MLX is given them as ``pointer_to_`` their name.
        folded: Whether the grid's threadgroups come in one long row.
    """
    places = _FOLDED if folded else _PLAIN
    named = {word for word in tokens(body) if word in _ATTRIBUTES or word in places}
    if "thread_position_in_grid" in named or (folded and _GROUP in named):
        named |= set(places)
    declared = ["using namespace metal;", "METAL_NAMES"]
    for name, value in (places | _ATTRIBUTES).items():
        if name in named:
            declared.append(f"const {'uint3' if value[0] == '{' else 'uint'} {name} = {value};")
    declared += [f"const auto {name} = *{POINTER_TO}{name};" for name in scalars]
    return "\n".join(f"  {line}" for line in declared) + "\n" + translated(body)


def translated(source: str) -> str:
    """Metal functions, or a kernel's body, as CUDA C++ that runs on the device."""
    source = rewrite_threadgroup(source, lambda declaration: f"__shared__ {declaration};")
    source = re.sub(r"\[\[[^\]]*\]\]", "", source)
    return "".join(
        _WORDS.get(token, token) if is_code(token) else token for token in tokens(source)
    )
