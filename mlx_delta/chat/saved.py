"""Conversations as files: JSON, checked when read, written whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_delta.system.files import write_whole

FORMAT = "mlx_delta conversation"
VERSION = 1
ROLES = ("user", "assistant")

_LARGEST = 64 << 20  # bytes; no context holds as much text


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        messages: Of ``role`` and ``content``: questions and answers by turns.
        system: The system prompt.
        model: Name of the model that answered.
        delta: The setting, as it is written on the command line; ``None`` for dense attention.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    system: str | None = None
    model: str | None = None
    delta: str | None = None


def write(file: str | Path, saved: Saved) -> Path:
    """Write a conversation; a file of another kind is not overwritten.

    Returns:
        Where it was written.

    Raises:
        ValueError: There is a file that is no conversation.
        OSError: It can't be written; what was there is as it was.
    """
    target = Path(os.path.realpath(os.path.expanduser(file)))
    if target.is_dir():
        raise IsADirectoryError(f"{file} is a directory; give a file's name.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {target.parent}.")
    if target.exists():
        if not target.is_file():
            raise OSError(f"{file} is a device or a pipe; give a file's name.")
        try:
            read(target)
        except ValueError as error:
            raise ValueError(f"{file} is left as it is: {error}") from error
    values = {"format": FORMAT, "version": VERSION, **vars(saved)}
    text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
    try:
        write_whole(target, text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise type(error)(f"{file} can't be written: {error.strerror or error}.") from error
    return target


def read(file: str | Path) -> Saved:
    """Read what :func:`write` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no conversation, or a newer version's.
        OSError: It can't be read.
    """
    path = Path(os.path.expanduser(file))  # which leaves ~NAME as it is where there is no NAME
    if path.is_dir():
        raise IsADirectoryError(f"{file} is a directory; give a file's name.")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {file}.")
    if not path.is_file():
        raise OSError(f"{file} is a device or a pipe; give a file's name.")
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise type(error)(f"{file} can't be read: {error.strerror or error}.") from error
    if len(content) > _LARGEST:
        raise ValueError(f"{file} is no conversation: it is larger than {_LARGEST >> 20} MB.")
    try:
        values = json.loads(content.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no conversation: it is not whole JSON.") from error
    try:
        return _checked(values)
    except ValueError as error:
        raise ValueError(f"{file} is no conversation: {error}.") from error


def _is_text(value: Any) -> bool:
    """Whether it is a text, without halves of characters, which no tokenizer takes."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def _checked(values: Any) -> Saved:
    """What a file's JSON says."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    if values.get("version") != VERSION:
        raise ValueError(
            f"it is of version {str(values.get('version'))[:20]}, and this program reads version "
            f"{VERSION}"
        )
    unknown = sorted(set(values) - {"format", "version", *vars(Saved())})
    if unknown:
        raise ValueError(f"it has an unknown entry {unknown[0][:40]!r}")
    for name in ("system", "model", "delta"):
        if values.get(name) is not None and not _is_text(values[name]):
            raise ValueError(f"its {name} is no text")
    messages = values.get("messages")
    if not isinstance(messages, list):
        raise ValueError("its messages are no list")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"message {i} is not of a role and a content")
        if message["role"] != ROLES[i % 2]:
            raise ValueError(f"message {i} is not the {ROLES[i % 2]}'s")
        if not _is_text(message["content"]):
            raise ValueError(f"message {i} has no text")
    if len(messages) % 2:
        raise ValueError("its last message has no answer")
    names = {name: values.get(name) for name in ("system", "model", "delta")}
    return Saved(messages=messages, **names)
