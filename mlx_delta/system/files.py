"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_aside(file: Path, data: bytes) -> Iterator[None]:
    """Write a file beside its place, into which it is moved if what is done meanwhile succeeds.

    Raises:
        OSError: It can't be written.
    """
    file = file.resolve()  # a link stays a link
    # Of a long name a part: with what is added to it, it may be no longer than 255 bytes.
    handle, temporary = tempfile.mkstemp(".tmp", f".{file.name[:50]}.", file.parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            shutil.copymode(file, temporary)
        else:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        yield
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink(missing_ok=True)
        raise


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that its place holds all of it, or what was there before.

    Raises:
        OSError: It can't be written.
    """
    with written_aside(file, data):
        pass
