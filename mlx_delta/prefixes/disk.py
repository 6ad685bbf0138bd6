"""Prefixes in a directory: found again after a restart, within a budget of bytes.

``DIRECTORY/v1/MODEL/LAYOUT/`` holds a file for each block and for each place where a text can go
on, named by the hash of all tokens so far, and ``layout.json``. Files are written aside and moved
into place, and checked when they are read: one that is damaged is removed, and written anew when
its text comes again. Age is a file's time of modification, set anew whenever it is used; later
blocks are a little older than those before them, so that the ends of texts go first. Whatever goes
wrong is said once and costs no more than the prefix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlx_delta.cache.sealed_file import read_header, read_sealed, sealed_bytes

from .chain import after
from .pieces import Layout, Mark
from .raw import Piece

VERSION = "v1"
FORMAT = "mlx_delta prefix 1"
_LAYOUT = "layout.json"
_SUFFIX = ".safetensors"
_OTHER = "it was written by another version, or is no prefix"
_DEPTH = 1000  # nanoseconds by which a block is older than the one before it
_PART = ".part"
_PART_AGE = 3600  # seconds after which nobody is writing a file any more


T = TypeVar("T")


class _OtherFileError(ValueError):
    """A file that is whole, and not ours."""


class PrefixDirectory:
    """Blocks and marks of texts in a directory.

    Args:
        path: The directory; made when something is written.
        budget: Bytes of files at most.
        say: Takes a message about what went wrong; warns by default.
    """

    def __init__(self, path: str | Path, budget: int, say: Callable[[str], None] | None = None):
        if not str(path):
            raise ValueError("[PrefixDirectory] path is empty; name a directory.")
        self.path = Path(path).expanduser()
        self.budget = budget
        self._say_it = say or (lambda text: warnings.warn(text, stacklevel=2))
        self._said: set[str] = set()
        self._writes = True
        self._broken: set[Path] = set()
        self._told: dict[Path, tuple[Mark, tuple[int, ...]]] = {}  # marks that were looked at
        self._lists: dict[Path, tuple[int, dict[str, list[Path]]]] = {}
        self._check()
        self._bytes = sum(size for _, size, _ in self._files())

    def _check(self) -> None:
        """Say at once whether anything can be written here."""
        try:
            folder = self.path / VERSION
            # What people ask is theirs: nobody else reads it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(None, "it is write-protected")
            self._clear(folder)
        except (OSError, ValueError) as error:  # a null byte
            self._stop(error)

    @staticmethod
    def _clear(folder: Path) -> None:
        """Remove what was being written when a process was killed."""
        for path in folder.glob(f"*/*/.*{_PART}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _PART_AGE:
                    path.unlink()

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return self._bytes

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say_it(text)

    def _stop(self, error: Exception) -> None:
        """Write no more."""
        reason = getattr(error, "strerror", None) or error
        self._say(
            f"[prefixes] can't write in {self.path}: {reason}; prefixes are kept in memory only."
        )
        self._writes = False

    def _files(self) -> list[tuple[int, int, Path]]:
        """Age, size and path of every file of ours."""
        found = []
        with contextlib.suppress(OSError):
            for path in (self.path / VERSION).glob(f"*/*/[bm]-*{_SUFFIX}"):
                with contextlib.suppress(OSError):  # another process took it away
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return found

    # Layouts.

    def _folder(self, identity: str, layout: Layout | None = None) -> Path:
        model = hashlib.sha256(identity.encode()).hexdigest()[:24]
        folder = self.path / VERSION / model
        return folder if layout is None else folder / layout.name[:24]

    def layouts(self, identity: str) -> list[Layout]:
        """Layouts of caches of this model, of which there are files."""
        found = []
        with contextlib.suppress(OSError):
            for file in sorted(self._folder(identity).glob(f"*/{_LAYOUT}")):
                try:
                    layout = Layout(file.read_text("utf-8"))
                    if layout.name[:24] != file.parent.name or layout.spec["version"] != 1:
                        raise ValueError(_OTHER)
                    found.append(layout)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    self._leave(file, error)
        return found

    # Reading.

    def _block_file(self, identity: str, layout: Layout, name: str) -> Path:
        return self._folder(identity, layout) / f"b-{name[:40]}{_SUFFIX}"

    def _mark_file(self, identity: str, layout: Layout, name: str, tail: Sequence[Any]) -> Path:
        folder = self._folder(identity, layout)
        return folder / f"m-{name[:40]}-{after(name, tail)[:24]}{_SUFFIX}"

    def has_block(self, identity: str, layout: Layout, name: str) -> bool:
        """Whether there is a file of a block that is not known to be broken."""
        file = self._block_file(identity, layout, name)
        return file not in self._broken and file.is_file()

    def read_block(self, identity: str, layout: Layout, name: str) -> Piece | None:
        """A block; ``None`` if it is not there, or can't be read."""
        found = self._read(self._block_file(identity, layout, name), name)
        return None if found is None else found[0]

    def marks(
        self, identity: str, layout: Layout, name: str
    ) -> Iterator[tuple[Mark, tuple[int, ...]]]:
        """Marks of texts that begin with the blocks up to ``name``, and the tokens after these.

        They come without their arrays: :meth:`whole` reads these.
        """
        folder = self._folder(identity, layout)
        for file in self._listed(folder).get(name[:40], []):
            if file in self._broken:
                continue
            if file not in self._told:
                told = self._reading(file, functools.partial(_read_mark, file, layout, name))
                if told is not None:
                    self._told[file] = told
            if file in self._told:
                yield self._told[file]

    def whole(self, identity: str, name: str, mark: Mark, tail: Sequence[Any]) -> Mark | None:
        """A mark with its arrays; ``None`` if they can't be read."""
        file = self._mark_file(identity, mark.layout, name, tail)
        found = self._read(file, name)
        if found is None:
            self._told.pop(file, None)
            return None
        return dataclasses.replace(mark, piece=found[0])

    def _listed(self, folder: Path) -> dict[str, list[Path]]:
        """Files of marks in a folder, by the name of their blocks; listed anew when it changes."""
        try:
            changed = folder.stat().st_mtime_ns
        except (OSError, ValueError):  # a null byte in its name
            return {}
        known = self._lists.get(folder)
        if known is None or known[0] != changed:
            found: dict[str, list[Path]] = {}
            for file in sorted(folder.glob(f"m-*{_SUFFIX}")):
                found.setdefault(file.name[2:42], []).append(file)
            known = self._lists[folder] = changed, found
        return known[1]

    def _read(self, file: Path, name: str) -> tuple[Piece, dict[str, str]] | None:
        def read() -> tuple[Piece, dict[str, str]]:
            piece, metadata = read_sealed(file)
            _check_format(metadata, name)
            return piece, metadata

        return self._reading(file, read)

    def _reading(self, file: Path, read: Callable[[], T]) -> T | None:
        """What a file has; ``None`` if it is not there, not ours, or damaged and thus removed."""
        try:
            before = file.stat()
            return read()
        except FileNotFoundError:
            return None
        except (OSError, MemoryError, _OtherFileError) as error:
            self._leave(file, error)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            try:
                now = file.stat()
                if (now.st_ino, now.st_size) == (before.st_ino, before.st_size):
                    file.unlink()
                    self._bytes -= before.st_size
                    self._say(f"[prefixes] {file} was damaged and is removed: {_reason(error)}.")
            except FileNotFoundError:  # by another process
                pass
            except OSError:
                self._leave(file, error)
        return None

    def _leave(self, file: Path, error: Exception) -> None:
        """Do without a file, which stays where it is."""
        self._broken.add(file)
        self._say(f"[prefixes] {file} is left out: {_reason(error)}.")

    def leave_block(self, identity: str, layout: Layout, name: str, error: Exception) -> None:
        """Do without a block that turned out not to fit."""
        self._leave(self._block_file(identity, layout, name), error)

    # Writing.

    def write(
        self,
        identity: str,
        names: Sequence[str],
        mark: Mark,
        tail: Sequence[Any],
        block: Callable[[int], Piece],
    ) -> None:
        """Write what is new of a text: blocks, and a mark behind them.

        Args:
            identity: Of the model.
            names: Of the text without tokens, and up to each of the blocks.
            mark: The mark.
            tail: Tokens after the blocks.
            block: Gives block ``i``.
        """
        if not self._writes or any(type(token) is not int for token in tail):
            return
        layout = mark.layout
        folder = self._folder(identity, layout)
        told = {
            "length": mark.length,
            "base": mark.base,
            "first": mark.first,
            "exact_from": mark.exact_from,
            "tail": list(tail),
            "forms": mark.forms,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / _LAYOUT  # of which the folder's name is the hash
            if file in self._broken or not file.exists():
                self._put(file, layout.text.encode())
            for i, name in enumerate(names[1:]):
                file = self._block_file(identity, layout, name)
                if file in self._broken or not file.exists():
                    self._put_piece(file, block(i), name)
            file = self._mark_file(identity, layout, names[-1], tail)
            if file in self._broken or not file.exists():
                self._put_piece(file, mark.piece, names[-1], {"mark": json.dumps(told)})
        except OSError as error:
            self._stop(error)
        self.use(identity, layout, names, tail)
        if self._bytes > self.budget:
            self._evict()

    def _put_piece(
        self, file: Path, piece: Piece, name: str, more: dict[str, str] | None = None
    ) -> None:
        metadata = {"format": FORMAT, "name": name, **(more or {})}
        self._put(file, sealed_bytes(piece, metadata))

    def _put(self, file: Path, data: bytes) -> None:
        """Write a file aside, and move it into place."""
        before = file.stat().st_size if file.exists() else 0
        temporary = file.with_name(f".{secrets.token_hex(6)}{_PART}")
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._broken.discard(file)
        self._told.pop(file, None)
        if file.name != _LAYOUT:
            self._bytes += len(data) - before

    def use(
        self, identity: str, layout: Layout, names: Sequence[str], tail: Sequence[Any] | None
    ) -> None:
        """Make the files of a text the youngest."""
        now = time.time_ns()
        files = [self._block_file(identity, layout, name) for name in names[1:]]
        if tail is not None:
            files.append(self._mark_file(identity, layout, names[-1], tail))
        for depth, file in enumerate(files):
            with contextlib.suppress(OSError, ValueError):
                os.utime(file, ns=(now, now - depth * _DEPTH))

    def _evict(self) -> None:
        """Remove the oldest files, until the rest is within the budget."""
        files = sorted(self._files())
        self._bytes = sum(size for _, size, _ in files)
        for _, size, file in files:
            if self._bytes <= self.budget:
                break
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            self._bytes -= size


def _check_format(metadata: dict[str, str], name: str) -> None:
    """Refuse a file that another version wrote, or another program."""
    if metadata.get("format") != FORMAT or metadata.get("name") != name:
        raise _OtherFileError(_OTHER)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).rstrip(".") or "it can't be read"


def _read_mark(file: Path, layout: Layout, name: str) -> tuple[Mark, tuple[int, ...]]:
    """What a file's header says of a mark, and the tokens after its blocks."""
    metadata = read_header(file).metadata
    _check_format(metadata, name)
    told = json.loads(metadata["mark"])
    names = ("length", "base", "first", "exact_from")
    length, base, first, exact_from = counts = [told[x] for x in names]
    tail = tuple(told["tail"])
    if any(type(x) is not int or x < 0 for x in (*counts, *tail)):
        raise ValueError("it counts something else than tokens")
    if length != base * layout.size + len(tail):
        raise ValueError("it counts other tokens than it has")
    return Mark(layout, length, base, first, exact_from, {}, dict(told["forms"])), tail
