"""Reading files that others made: regular files only, bounded, strict JSON, checksums."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from .errors import ConvertError

# Larger ones are not what they claim to be; the largest tokenizer.json known are about 40 MB.
MAX_JSON_BYTES = 256 << 20
# Writing JSON again recurses further than reading it: what is read must stay well below.
MAX_NESTING = 64


def regular_file(path: Path) -> os.stat_result:
    """The status of a regular file (links to one included, as the hub's cache has them).

    Raises:
        ConvertError: It does not exist, or is a directory, a device, a pipe or a cyclic link.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        dangling = " (a link to nothing)" if path.is_symlink() else ""
        raise ConvertError(f"{path} does not exist{dangling}; fetch the model again.") from None
    except (OSError, ValueError) as error:  # a cyclic link, no permission, a NUL in the name
        raise ConvertError(f"{path} can't be read: {error}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConvertError(f"{path} is not a regular file; give the model's own files.")
    return status


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole small file.

    Raises:
        ConvertError: It is larger than ``limit`` bytes or can't be read.
    """
    size = regular_file(path).st_size
    if size > limit:
        raise ConvertError(f"{path} has {size} bytes, more than the {limit} such a file may have.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConvertError(f"{path} can't be read: {error}.") from None


def parse_json(text: bytes, name: str) -> Any:
    """Strict JSON: UTF-8, no repeated keys, no NaN, bounded nesting.

    Raises:
        ConvertError: It is not; the message says where.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) != len(items):
            keys = [key for key, _ in items]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ConvertError(f"{name} has the key {repeated[:80]!r} twice.")
        return values

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ConvertError(f"{name} holds the number {text[:40]}, which is not finite.")
        return value

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=number,
            parse_float=number,
        )
        _check_nesting(value, name)
        if b"\\u" in text:  # half of a pair can be escaped, but not written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except ConvertError:
        raise
    except RecursionError:
        raise ConvertError(f"{name} is nested too deeply to be a model's file.") from None
    except ValueError as error:  # JSONDecodeError, a UnicodeError, an over-long integer
        raise ConvertError(f"{name} is not valid JSON: {error}.") from None


def _check_nesting(value: Any, name: str) -> None:
    """Refuse lists and objects within more than ``MAX_NESTING`` others.

    Raises:
        ConvertError: There are some.
    """
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_NESTING):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ConvertError(f"{name} is nested too deeply to be a model's file.")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConvertError: It is missing, too large, broken, or not an object.
    """
    value = parse_json(read_bytes(path, limit), str(path))
    if not isinstance(value, dict):
        raise ConvertError(f"{path} must hold a JSON object but holds {type(value).__name__}.")
    return value


def sha256(path: Path) -> str:
    """A file's SHA-256, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def dump_json(value: Any) -> bytes:
    """JSON as this package writes it: readable, and the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def format_bytes(count: float) -> str:
    """1,234,567 as 1.23 MB: decimal units, as stores and file managers show them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
