"""Prompt caches on disk, in mlx-lm's own format: written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache


def check_writable(file: str | Path) -> None:
    """Refuse a path that could not be written, before any work is done.

    Raises:
        OSError: The path is a directory, or its directory is missing or not writable.
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(f"[prompt_cache] {file} is a directory; give a file name.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"[prompt_cache] there is no directory {file.parent}.")
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"[prompt_cache] can't write in {file.parent}.")


def save(file: str | Path, caches: list[Any], metadata: dict[str, str]) -> None:
    """Write caches to a ``.safetensors`` file; an interruption leaves no half-written one.

    Raises:
        OSError: It can't be written.
    """
    check_writable(file)
    file = Path(file)
    # MLX appends the ending when it is missing, so the temporary name has to have it.
    handle, temporary = tempfile.mkstemp(".safetensors", f".{file.name}.", file.parent)
    os.close(handle)
    try:
        save_prompt_cache(temporary, caches, metadata)
        os.replace(temporary, file)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # what MLX raises when the disk is full
            raise OSError(f"[prompt_cache] can't write {file}: {error}") from error
        raise


def load(file: str | Path) -> tuple[list[Any], dict[str, str]]:
    """Read caches and metadata written by :func:`save`, or by ``mlx_lm.cache_prompt``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a prompt cache, or it is damaged.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"[prompt_cache] there is no prompt cache {str(file)!r}.")
    try:
        caches, metadata = load_prompt_cache(str(file), return_metadata=True)
    except (RuntimeError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"[prompt_cache] {file} is not a prompt cache: {error}") from error
    return caches, metadata
