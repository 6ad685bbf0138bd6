"""JSON files of a checkpoint: objects of a bounded size and depth."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

# The largest tokenizer.json known are about 40 MB.
MAX_BYTES = 256 << 20
# Python's reader and mlx-lm's walk through a configuration by recursion.
MAX_DEPTH = 64
# Characters of a value that an error shows.
SHOWN = 80


def shown(value: Any) -> str:
    """A value for an error message: on one line, and cut short."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep list
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def one_line(error: BaseException) -> str:
    """An error's message on one line, cut short where it lists hundreds of names."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 4 * SHOWN else f"{text[: 4 * SHOWN]}..."


def check_regular(file: Path) -> int:
    """Bytes of a regular file; links to one are followed, as the hub's cache has them.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is a directory, a pipe, a device, or can't be looked at.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"[load] {file} does not exist; fetch the model again.") from None
    except (OSError, ValueError) as error:  # a cyclic link, no permission, a NUL in the name
        raise ValueError(f"[load] {file} can't be read: {one_line(error)}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"[load] {file} is not a regular file.")
    return status.st_size


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, is too large, or is nested too deeply.
    """
    size = check_regular(file)
    if size > MAX_BYTES:
        raise ValueError(f"[load] {file} has {size} bytes; at most {MAX_BYTES} are read.")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"[load] {file} can't be read: {one_line(error)}.") from error
    return parse_object(data, str(file))


def parse_object(data: bytes, name: str, unique: bool = False) -> dict[str, Any]:
    """A JSON object.

    Args:
        data: UTF-8, with or without a byte order mark.
        name: What it is, for the message.
        unique: Refuse a key that stands twice.

    Raises:
        ValueError: It is something else, or nested too deeply.
    """
    try:
        hook = _unique if unique else None
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=hook)
    except RecursionError:
        raise ValueError(f"[load] {name} is nested too deeply.") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise ValueError(f"[load] {name} is not valid JSON: {one_line(error)}.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"[load] {name} must hold a JSON object but holds {type(values).__name__}."
        )
    if _depth(values) > MAX_DEPTH:
        raise ValueError(f"[load] {name} is nested too deeply.")
    return values


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these keys and values, each key once."""
    values = dict(items)
    if len(values) != len(items):
        twice = next(key for key, n in Counter(key for key, _ in items).items() if n > 1)
        raise ValueError(f"the key {shown(twice)} stands twice")
    return values


def _depth(values: Any) -> int:
    """How deep lists and objects are nested, up to just over ``MAX_DEPTH``."""
    depth, level = 0, [values]
    while level and depth <= MAX_DEPTH:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = [value for value in inner if isinstance(value, (dict, list))]
        depth += 1
    return depth
