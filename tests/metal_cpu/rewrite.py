"""The text rewriting between Metal and C++: threadgroup variables, and 16-bit literals.

`threadgroup` in `threadgroup float* p` can be dropped by a macro. In `threadgroup float tile[64];`
it is a storage class that C++ does not have, so that declaration becomes a reference to memory that
the runtime hands out.
"""

from __future__ import annotations

import re

from mlx_delta.ops.metal_text import (
    RewriteError,
    rewrite_threadgroup,
    split_top_level,
    without_comments,
)

_DECLARATOR = re.compile(r"(?P<name>\w+)\s*(?P<dimensions>(?:\[.*\])?)\s*$", re.DOTALL)


def rewrite(source: str) -> str:
    """Turns Metal into what C++ with the headers of runtime/msl accepts, line by line."""
    literal = r"(?<![\w.])((?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)"
    source = re.sub(literal + r"[hH]\b", r"half(\1)", source)
    source = re.sub(literal + r"(?:bf|BF)\b", r"bfloat(\1)", source)
    # Unrolling says nothing on what is computed, and here costs seconds of compiling.
    source = re.sub(r'_Pragma\("clang loop unroll[^"]*"\)', "", source)
    return rewrite_threadgroup(source, bind_to_runtime)


def bind_to_runtime(declaration: str, space: str = "threadgroup ") -> str:
    """`float a[4], b` as C++ that binds `a` and `b` to memory of the runtime."""
    lines = declaration.count("\n")
    code = without_comments(declaration).replace("\n", " ")
    first, *others = split_top_level(code)
    match = _DECLARATOR.search(first)
    if match is None:
        raise RewriteError(f"cannot read the declaration: threadgroup {declaration.strip()!r}")
    type_name = first[: match.start()].strip()
    declared = []
    for declarator in [match.group(0), *others]:
        part = _DECLARATOR.search(declarator)
        if part is None:
            raise RewriteError(f"cannot read the declaration: threadgroup {declaration.strip()!r}")
        name = part["name"]
        declared.append(
            f"static const char {name}_key = 0; "
            f"using {name}_type = {space}{type_name}{part['dimensions']}; "
            f"{name}_type& {name} = "
            f'metal::threadgroup_variable<{name}_type>(&{name}_key, "{name}");'
        )
    return " ".join(declared) + "\n" * lines
