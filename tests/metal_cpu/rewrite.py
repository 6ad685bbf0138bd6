"""The text rewriting between Metal and C++: threadgroup variables, and 16-bit literals.

`threadgroup` is two things in Metal. In `threadgroup float* p` it qualifies what a pointer points
at, which a macro can express (or drop). In `threadgroup float tile[64];` it is a storage class that
C++ does not have, so that declaration becomes a reference to memory that the runtime hands out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/              # comments
      | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
      | ^[ \t]*\#(?:\\\n|[^\n])*          # a preprocessor line with its continuations
      | \w+ | \s+ | .
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_DECLARATOR = re.compile(r"(?P<name>\w+)\s*(?P<dimensions>(?:\[.*\])?)\s*$", re.DOTALL)
_CLOSING = {"]": "[", ")": "(", "}": "{", ">": "<"}


class RewriteError(ValueError):
    """A declaration that this file does not understand."""


def tokens(source: str) -> list[str]:
    """Splits Metal or C++ source; joined, the tokens give the source back."""
    return TOKEN.findall(source)


def is_code(token: str) -> bool:
    """False for comments, white space and preprocessor lines."""
    return not (token.isspace() or token.startswith(("//", "/*")) or token.lstrip().startswith("#"))


def split_top_level(text: str, separator: str = ",") -> list[str]:
    """Splits at separators that stand outside of brackets: "a[f(1, 2)], b" gives two parts."""
    parts, depth = [""], 0
    for token in tokens(text):
        depth += (token in _CLOSING.values()) - (token in _CLOSING)
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def rewrite(source: str) -> str:
    """Turns Metal into what C++ with the headers of runtime/msl accepts, line by line."""
    literal = r"(?<![\w.])((?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)"
    source = re.sub(literal + r"[hH]\b", r"half(\1)", source)
    source = re.sub(literal + r"(?:bf|BF)\b", r"bfloat(\1)", source)
    # Unrolling says nothing on what is computed, and here costs seconds of compiling.
    source = re.sub(r'_Pragma\("clang loop unroll[^"]*"\)', "", source)
    return rewrite_threadgroup(source)


def rewrite_threadgroup(source: str, write: Callable[[str], str] | None = None) -> str:
    """Replaces declarations of threadgroup variables; line numbers stay as they are.

    Args:
        source: Metal.
        write: Gives what to write for a declaration such as `float a[4], b`; by default
            references to memory of the runtime.
    """
    write = write or _reference
    result: list[str] = []
    depth = 0  # of parentheses: within them `threadgroup` qualifies a parameter or a cast
    stream = tokens(source)
    position = 0
    while position < len(stream):
        token = stream[position]
        if token.lstrip().startswith("#") and re.search(r"\bthreadgroup\b(?![^*&]*[*&])", token):
            raise RewriteError(f"threadgroup variable declared in a macro: {token.strip()!r}")
        depth += (token == "(") - (token == ")")
        if token == "threadgroup" and depth == 0:
            end = _end_of_declarators(stream, position)
            declaration = "".join(stream[position + 1 : end])
            if stream[end : end + 1] == [";"] and _declares_storage(declaration):
                result.append(write(declaration))
                position = end + 1
                continue
        result.append(token)
        position += 1
    return "".join(result)


def _end_of_declarators(stream: list[str], position: int) -> int:
    """Index of the token that ends the declarators: a `;`, or what shows that there are none."""
    depth = 0
    while position < len(stream):
        token = stream[position]
        if token in (";", "{", "=") or (token == ")" and depth == 0):
            break
        depth += (token == "(") - (token == ")")
        position += 1
    return position


def _declares_storage(declaration: str) -> bool:
    outside = re.sub(r"\[.*?\]|<.*>", "", without_comments(declaration), flags=re.DOTALL)
    return not re.search(r"[*&()<>]", outside) and len(outside.split()) >= 2


def without_comments(source: str) -> str:
    """The source with a space for each comment and preprocessor line."""
    return "".join(t if is_code(t) or t.isspace() else " " for t in tokens(source))


def _reference(declaration: str) -> str:
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
            f"using {name}_type = threadgroup {type_name}{part['dimensions']}; "
            f"{name}_type& {name} = "
            f'metal::threadgroup_variable<{name}_type>(&{name}_key, "{name}");'
        )
    return " ".join(declared) + "\n" * lines
