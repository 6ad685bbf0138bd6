"""Prompt caches on disk, in mlx-lm's own format with a checksum: written whole or not at all.

Nothing in a file is believed before it is checked: a header is data of whoever wrote it.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import _BaseCache, load_prompt_cache, save_prompt_cache

from .check_state import check_caches
from .layout import map_caches
from .sealed_file import CHECKSUM, NO_CHECKSUM, Header, check_seal, read_header, seal
from .single import DeltaKVCache

SUFFIX = ".safetensors"
OURS = DeltaKVCache.__name__  # the one kind that mlx-lm's module does not define

# mlx-lm flattens [metadata, class names, scalars] and the states of the caches; these are the
# forms that the keys take. A long index would have it make as many empty entries.
_METADATA = re.compile(r"0\.[A-Za-z_]\w*|1\.\d{1,4}|2\.0|2\.\d{1,5}\.[01]")
_TENSOR = re.compile(r"\d{1,4}(\.\d{1,3}){0,4}")
_LONGEST_STRING = 1 << 20


def check_writable(file: str | Path) -> Path:
    """Refuse a path that could not be written, before any work is done.

    Returns:
        The file itself, where the path is a symbolic link.

    Raises:
        OSError: The path is a directory or a device, or can't be written, or has a name that
            mlx-lm would not read.
    """
    if Path(file).suffix != SUFFIX and not os.path.isdir(file):
        raise OSError(
            f"[prompt_cache] the file's name must end in {SUFFIX} but got {str(file)!r}; under "
            "another one it could not be read back."
        )
    try:
        target = Path(file).resolve(strict=False)
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a null byte
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"[prompt_cache] can't write {str(file)!r}: {reason}.") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(f"[prompt_cache] {file} is a directory; give a file name.")
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(f"[prompt_cache] {file} is a device or a pipe; give a file name.")
    if not target.parent.is_dir():
        parent = target.parent if Path(file).is_symlink() else Path(file).parent
        raise FileNotFoundError(f"[prompt_cache] there is no directory {parent}.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"[prompt_cache] can't write in {target.parent}.")
    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(f"[prompt_cache] {file} is write-protected.")
    return target


def save(file: str | Path, caches: list[Any], metadata: dict[str, str]) -> None:
    """Write caches to a ``.safetensors`` file; an interruption leaves no half-written one.

    A file that is there keeps its mode, and a link to it stays one.

    Args:
        file: The path.
        caches: One cache for each layer.
        metadata: What to know about them; mlx-lm reads ``model`` and ``tokenizer_config``.

    Raises:
        OSError: It can't be written.
    """
    target = check_writable(file)
    # MLX appends the ending when it is missing, so the temporary name has to have it.
    temporary = target.with_name(f".prompt-cache-{secrets.token_hex(4)}{SUFFIX}")
    try:
        # Made here, for the permissions that the umask gives; MLX then keeps them.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode) | stat.S_IWUSR)
        small = map_caches(caches, lambda x, _: x.compact() if type(x) is DeltaKVCache else x)
        save_prompt_cache(str(temporary), small, {**metadata, CHECKSUM: NO_CHECKSUM})
        seal(temporary, f"0.{CHECKSUM}")
        _to_disk(temporary)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise type(error)(f"[prompt_cache] can't write {file}: {reason}.") from error
        # What MLX raises when the disk is full, and what we say of a file cut short.
        if isinstance(error, (RuntimeError, ValueError)):
            raise OSError(f"[prompt_cache] can't write {file}: {error}.") from error
        raise


def _to_disk(file: Path) -> None:
    """Wait until a file's bytes are on the disk: else it could be empty after a crash."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(file: str | Path) -> tuple[list[Any], dict[str, str]]:
    """Read caches and metadata written by :func:`save`, or by ``mlx_lm.cache_prompt``.

    Files that mlx-lm wrote have no checksum; damage to them may go unnoticed.

    Returns:
        The caches, and the metadata: with the checksum, if there is one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a prompt cache, or it is damaged.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"[prompt_cache] there is no prompt cache {str(file)!r}.")
    if path.suffix != SUFFIX:
        raise ValueError(f"[prompt_cache] {file} is not a prompt cache: its name lacks {SUFFIX}.")
    try:
        header = read_header(path)
        check_seal(path, header, f"0.{CHECKSUM}")
        _check_structure(header)
        caches = _read(path)
        check_caches(caches)
    except (
        # What MLX and mlx-lm raise of data that they did not expect.
        *(RuntimeError, KeyError, IndexError, TypeError, AttributeError, ValueError),
        *(OverflowError, AssertionError, MemoryError),
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"[prompt_cache] {file} is not a prompt cache: {reason}.") from error
    metadata = {
        key.removeprefix("0."): value
        for key, value in header.metadata.items()
        if key.startswith("0.")
    }
    return caches, metadata


def _check_structure(header: Header) -> None:
    """Refuse names that are not those of a prompt cache."""
    for key in header.metadata:
        if not _METADATA.fullmatch(key):
            raise ValueError(f"unknown metadata {key[:40]!r}")
    for name in header.names:
        if not _TENSOR.fullmatch(name):
            raise ValueError(f"unknown tensor {name[:40]!r}")
    classes = [key for key in header.metadata if key.startswith("1.")]
    if not classes:
        raise ValueError("it names no caches")
    if sorted(classes) != sorted(f"1.{i}" for i in range(len(classes))):
        raise ValueError("it lacks one of its caches")
    for key in classes:
        name = header.metadata[key]
        found = DeltaKVCache if name == OURS else getattr(mlx_lm_cache, name, None)
        is_cache = isinstance(found, type) and issubclass(found, _BaseCache)
        if not is_cache or name.startswith("Batch"):
            raise ValueError(f"there is no kind of cache {name[:40]!r}")
    layers = {int(name.split(".")[0]) for name in header.names}
    if layers != set(range(len(classes))):
        raise ValueError(f"it has {len(classes)} caches but tensors of {len(layers)}")


def _read(file: Path) -> list[Any]:
    """The caches of a file that was looked through."""
    arrays: Any = mx.load(str(file))
    # A string is stored as one number per character.
    if any(x.ndim < 2 and x.size > _LONGEST_STRING for x in arrays.values()):
        raise ValueError("it holds a text that is too long")
    caches: list[Any] = load_prompt_cache(str(file))
    return caches
