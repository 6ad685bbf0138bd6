"""The strict pass: refuses source that Metal's compiler would refuse and C++ would not mind.

The executing pass forgets address spaces. Here they are real type qualifiers (clang can do that),
so that a pointer without one, or the wrong one, is an error. Only the syntax is checked, in a tenth
of a second.
"""

from __future__ import annotations

import re

from mlx_delta.ops.metal_text import RewriteError, split_top_level, without_comments

from .errors import KernelRejected
from .rewrite import rewrite
from .signature import GeneratedKernel
from .toolchain import (
    MLX_INCLUDE,
    CompileError,
    Compiler,
    cached,
    call_compiler,
    include_flags,
    write_atomically,
)

_VECTOR = r"(?:metal::)?vec\s*<[^<>;(){}]*>"
_VECTOR_NAMES = r"(?:float|half|bfloat|u?int|u?short|u?char|u?long|bool)[234]"
# bfloat converts to float implicitly, but nothing converts to it, nor it to half, without a cast.
_BFLOAT_CONVERSION = re.compile(
    r"kernel\.metal:.*(?:to '[^']*(?:bfloat|__bf16)|'[^']*(?:bfloat|__bf16)[^']*' to '[^']*half)"
)


def check(compiler: Compiler, generated: GeneratedKernel) -> None:
    """Raises KernelRejected if Metal's compiler would refuse the kernel.

    Args:
        compiler: A clang; with any other compiler there is nothing to check with.
        generated: MLX's source, whose instantiation makes templates be checked too.
    """
    try:
        if problem := _lint(generated):
            raise KernelRejected(f"strict: {problem}")
        unit = _translation_unit(generated)
    except RewriteError as error:
        raise KernelRejected(f"strict: {error}") from None
    accepted = cached([unit, str(compiler)], ".accepted")
    if accepted.exists():
        return
    path = cached([unit], ".strict.cpp")
    write_atomically(path, unit)
    flags = ["-x", "c++", "-std=c++17", "-fsyntax-only", "-nostdinc", "-Wno-everything"]
    flags += ["-Wimplicit-float-conversion", "-Wno-implicit-int-float-conversion"]
    flags += ["-ferror-limit=0", "-Xclang", "-cl-single-precision-constant"]
    try:
        warnings = call_compiler([*compiler.syntax_command, *flags, *include_flags(), str(path)])
    except CompileError as error:
        if errors := _without_copies(str(error)):
            raise KernelRejected(f"strict: {errors[:6000]}") from None
        warnings = str(error)
    if conversions := [line for line in warnings.splitlines() if _BFLOAT_CONVERSION.search(line)]:
        raise KernelRejected("strict: Metal needs a cast here:\n" + "\n".join(conversions))
    write_atomically(accepted, "")


def _without_copies(errors: str) -> str:
    """Drops the errors about copying a structure between address spaces, which Metal allows."""
    copy = re.compile(
        r"implicit copy constructor\) not viable: cannot bind reference in address space"
        r"|implicit copy assignment operator\) not viable: (?:'this' object is in address space"
        r"|cannot bind reference in address space)"
    )
    parts = re.split(r"^(?=\S+:\d+:\d+: (?:fatal )?error:)", errors, flags=re.MULTILINE)
    return "".join(part for part in parts if " error: " in part and not copy.search(part))


def _translation_unit(generated: GeneratedKernel) -> str:
    text = generated.text.replace("[[kernel]]", "")
    text = re.sub(r"template \[\[host_name\([^\]]*\)\]\]", "template", text)
    text = array_parameters(construct_vectors(rewrite(text)))
    utilities = array_parameters((MLX_INCLUDE / "mlx/backend/metal/kernels/utils.h").read_text())
    utilities = utilities.replace("#pragma once", "")
    return f'#include "msl/strict.h"\n{utilities}\n#line 1 "kernel.metal"\n{text}\n'


def _lint(generated: GeneratedKernel) -> str | None:
    """What needs no compiler."""
    code = without_comments(generated.source)
    # C++ lets a C-style cast drop an address space.
    cast = r"\(\s*(?:const\s+)?\w+(?:\s*<[^()]*?>)?(?:\s+const)?\s*\*\s*\)\s*[\w(&]"
    if match := re.search(cast, code):
        return f"pointer cast without an address space: {match[0]!r}"
    literal = r"\b(?:\d+\.\d*|\.\d+|\d+[eE][+-]?\d+)(?:[eE][+-]?\d+)?[lL]\b"
    if match := re.search(literal, code):
        return f"Metal has no long double: {match[0]}"
    if match := re.search(r"threadgroup_variable<(\w+)_type>", rewrite(generated.header)):
        return f"only a kernel may declare a threadgroup variable, not a function: {match[1]}"
    return None


def construct_vectors(source: str) -> str:
    """Rewrites `float2(a, b)` and `float2 v(a, b);`, which clang knows in Metal but not in C++."""
    alias = re.compile(
        rf"\busing\s+(\w+)\s*=\s*(?:{_VECTOR}|{_VECTOR_NAMES})\s*;"
        rf"|\btypedef\s+(?:{_VECTOR}|{_VECTOR_NAMES})\s+(\w+)\s*;"
    )
    aliases = {name for pair in alias.findall(source) for name in pair if name}
    types = "|".join([_VECTOR, rf"(?:metal::)?{_VECTOR_NAMES}", *sorted(aliases)])
    result = re.sub(
        rf"(?<![\w:.])({types})\s*\((?!\s*[&*]\s*\w*\s*\)\s*[\[(])", r"metal::make_vec<\1>(", source
    )

    def declaration(match: re.Match[str]) -> str:
        type_name, name, arguments = match.groups()
        if any(re.search(r"[\w>]\s*[*&]?\s+[*&]?\w+\s*$", a) for a in split_top_level(arguments)):
            return match[0]  # declares a function: its parameters have types
        return f"{type_name} {name} = metal::make_vec<{type_name}>({arguments});"

    return re.sub(rf"\b({types})\s+(\w+)\s*\(([^;{{}}]*)\)\s*;", declaration, result)


def array_parameters(source: str) -> str:
    """Rewrites the parameter `constant int shape[3]` as `constant int* shape`, which is the same.

    Clang refuses the first because it takes the address space for the parameter's own.
    """
    parameter = r"\b(device|constant|threadgroup)\b([^,()*&;{}]*?)(\w+)\s*\[[^\]]*\](?=\s*[,)])"
    return re.sub(parameter, r"\1\2* \3", source)
