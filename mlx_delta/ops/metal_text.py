"""Reading Metal source as words: where a `threadgroup` variable is declared, and what is code.

`threadgroup` is two things in Metal. In `threadgroup float* p` it qualifies what a pointer points
at, which other languages drop. In `threadgroup float tile[64];` it is a storage class.
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


def without_comments(source: str) -> str:
    """The source with a space for each comment and preprocessor line."""
    return "".join(t if is_code(t) or t.isspace() else " " for t in tokens(source))


def rewrite_threadgroup(source: str, write: Callable[[str], str], word: str = "threadgroup") -> str:
    """Replaces declarations of threadgroup variables; the rest stays as it is.

    Args:
        source: Metal.
        write: Gives what to write for a declaration such as `float a[4], b`.
        word: The storage class; `__shared__` in CUDA.

    Raises:
        RewriteError: A macro declares one.
    """
    result: list[str] = []
    depth = 0  # of parentheses: within them `threadgroup` qualifies a parameter or a cast
    stream = tokens(source)
    position = 0
    while position < len(stream):
        token = stream[position]
        if token.lstrip().startswith("#") and re.search(rf"\b{word}\b(?![^*&]*[*&])", token):
            raise RewriteError(f"{word} variable declared in a macro: {token.strip()!r}")
        depth += (token == "(") - (token == ")")
        if token == word and depth == 0:
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
