"""The only text rewriting between Metal and C++: declarations of threadgroup variables.

`threadgroup` is two things in Metal. In `threadgroup float* p` it qualifies what a pointer points at,
which a macro can express (or drop). In `threadgroup float tile[64];` it is a storage class that C++ does
not have, so that declaration becomes a reference to memory that the runtime hands out.
"""

from __future__ import annotations

import re

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


def rewrite_threadgroup(source: str) -> str:
    """Replaces declarations of threadgroup variables; line numbers stay as they are."""
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
            end = position
            while end < len(stream) and stream[end] not in (";", "{", ")", "="):
                end += 1
            declaration = "".join(stream[position + 1 : end])
            if end < len(stream) and stream[end] == ";" and _declares_storage(declaration):
                result.append(_reference(declaration))
                position = end + 1
                continue
        result.append(token)
        position += 1
    return "".join(result)


def _declares_storage(declaration: str) -> bool:
    code = "".join(token for token in tokens(declaration) if is_code(token) or token.isspace())
    outside = re.sub(r"\[.*?\]|<.*>", "", code, flags=re.DOTALL)
    return not re.search(r"[*&()<>]", outside) and len(outside.split()) >= 2


def _reference(declaration: str) -> str:
    """`float a[4], b` as C++ that binds `a` and `b` to memory of the runtime."""
    lines = declaration.count("\n")
    code = " ".join(t for t in tokens(declaration.replace("\n", " ")) if is_code(t) and t.strip())
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
            f"using {name}_type = threadgroup {type_name} {part['dimensions']}; "
            f"{name}_type& {name} = "
            f'metal::threadgroup_variable<{name}_type>(&{name}_key, "{name}");'
        )
    return " ".join(declared) + "\n" * lines
