"""Captures the Metal source that MLX itself would compile, and reads its signature.

`mx.fast.metal_kernel` takes a body and writes the rest: the buffers' types and address spaces, the
attributes that the body names, the template. Writing that a second time would be testing a copy.
MLX prints its text when a kernel is called with `verbose=True`, which works on machines without
Metal as long as nothing is evaluated: inside `mx.export_function`.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


class SignatureError(RuntimeError):
    """MLX's generated source is not of the shape this file knows."""


@dataclass(frozen=True)
class Buffer:
    """A buffer of the generated function: `const device half* x [[buffer(0)]]`."""

    name: str
    type: str
    space: str  # "device" or "constant"
    is_const: bool
    is_reference: bool


@dataclass(frozen=True)
class GeneratedKernel:
    """MLX's source of one kernel for one combination of types and template arguments."""

    text: str  # all of it, as MLX would compile it
    source: str  # without the line that instantiates the template
    header: str  # the functions in front of the kernel
    function: str  # "custom_kernel_add_float" or "custom_kernel_add<float16_t, 4>"
    buffers: tuple[Buffer, ...]
    attributes: tuple[str, ...]  # "thread_position_in_grid", in the order of the parameters


def capture(kernel: Callable[..., Any], inputs: Sequence[Any], **call: Any) -> str:
    """Returns the Metal source for `kernel(inputs=inputs, **call)`, which is not run.

    Args:
        kernel: What `mx.fast.metal_kernel` returned.
        inputs: Arrays or scalars, as for the call.
        **call: The call's other arguments.
    """
    arrays = [x for x in inputs if isinstance(x, mx.array)]

    def call_kernel(*traced: mx.array) -> Any:
        remaining = iter(traced)
        given = [next(remaining) if isinstance(x, mx.array) else x for x in inputs]
        return kernel(inputs=given, **call, verbose=True)

    def export() -> None:
        with tempfile.TemporaryDirectory() as folder:
            mx.export_function(os.path.join(folder, "kernel.mlxfn"), call_kernel, *arrays)

    printed = _standard_output_of(export)
    match = re.search(r"```\n(.*)\n```", printed, re.DOTALL)
    if match is None:
        raise SignatureError(f"MLX printed no source for the kernel but {printed!r}")
    return match[1]


def _standard_output_of(function: Callable[[], None]) -> str:
    """What a function prints on file descriptor 1: MLX prints from C++, past sys.stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 1)
            try:
                function()
            finally:
                ctypes.CDLL(None).fflush(None)
                os.dup2(saved, 1)
            file.seek(0)
            return file.read().decode()
    finally:
        os.close(saved)


_INSTANTIATION = re.compile(
    r'\ntemplate \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] decltype\((.*?)\) ', re.DOTALL
)
_BUFFER = re.compile(
    r"(?P<const>const )?(?P<space>device|constant) (?P<type>.+?)(?P<kind>[*&]) "
    r"(?P<name>\w+) \[\[buffer\((?P<index>\d+)\)\]\]"
)


def parse(text: str) -> GeneratedKernel:
    """Reads the signature of a generated kernel."""
    instantiation = _INSTANTIATION.search(text)
    source = text[: instantiation.start()] if instantiation else text
    start = source.rfind("[[kernel]] void custom_kernel_")  # the header may hold other functions
    signature = re.match(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", source[start:], re.DOTALL)
    if start < 0 or signature is None:
        raise SignatureError(f"no kernel function in the generated source:\n{text[:2000]}")
    buffers: list[Buffer] = []
    attributes: list[str] = []
    for parameter in signature[2].split("\n"):
        buffer = _BUFFER.search(parameter)
        attribute = re.search(r"\[\[(\w+)\]\]", parameter)
        if buffer is not None and int(buffer["index"]) == len(buffers):
            buffers.append(
                Buffer(
                    name=buffer["name"],
                    type=buffer["type"],
                    space=buffer["space"],
                    is_const=buffer["const"] is not None,
                    is_reference=buffer["kind"] == "&",
                )
            )
        elif attribute is not None:
            attributes.append(attribute[1])
        else:
            raise SignatureError(f"cannot read the parameter {parameter.strip()!r}")
    function = instantiation[1] if instantiation else signature[1]
    header = source[:start]
    return GeneratedKernel(text, source, header, function, tuple(buffers), tuple(attributes))
