"""``key_bits=4,level=0.1``: a dataclass's fields as the command lines write them.

Tuples are joined by slashes, tuples within them by colons: ``0.9:1.1/1.0:1.2``. Of a tuple with one
value the joint stands behind it: ``0.9/``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .wording import nearest

_JOINTS = ("/", ":")
_WORDS = {"true": True, "false": False, "none": None}


def read_fields(text: str, kind: type) -> dict[str, Any]:
    """The fields in a text.

    Args:
        text: What was written; empty for no fields.
        kind: The dataclass that they are of.

    Raises:
        ValueError: A field is unknown, given twice, or lacks a value.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for part in text.split(",") if text.strip() else []:
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in known:
            raise ValueError(
                f"[{kind.__name__}] unknown option {name!r}{nearest(name, known)}; known are "
                f"{', '.join(known)}."
            )
        if not equals or not value:
            raise ValueError(f"[{kind.__name__}] {name} lacks a value, as in {name}=1.")
        if name in values:
            raise ValueError(f"[{kind.__name__}] {name} is given twice; drop one.")
        values[name] = _read(value)
    return values


def write_fields(values: Mapping[str, Any]) -> str:
    """The opposite: what :func:`read_fields` reads."""
    return ",".join(f"{name}={_write(value)}" for name, value in values.items())


def _read(text: str) -> Any:
    """A number, a word, or several of them joined."""
    for joint in _JOINTS:
        if joint in text:
            parts = text.removesuffix(joint).split(joint)
            return tuple(_read(part) if part else part for part in parts)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _write(value: Any, depth: int = 0) -> str:
    if isinstance(value, tuple):
        joint = _JOINTS[depth]
        return joint.join(_write(v, depth + 1) for v in value) + joint * (len(value) == 1)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
