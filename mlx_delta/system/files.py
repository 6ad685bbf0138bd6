"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_aside(file: Path, data: bytes) -> Iterator[None]:
    """Write a file beside its place, into which it is moved if what is done meanwhile succeeds.

    A link stays one, and an old file's permissions stay where they can.

    Raises:
        OSError: It can't be written, or what is there is a device or a pipe; it names the file.
    """
    file = Path(os.path.realpath(file))  # which takes a link that goes round in a circle for a file
    old = file.is_file()
    if file.exists() and not old and not file.is_dir():
        raise OSError(errno.EINVAL, "is a device or a pipe", str(file))
    # Of a long name a part: with what is added to it, it may be no longer than 255 bytes.
    temporary = file.with_name(f".{file.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        mode = 0o600 if old else 0o666  # without what the umask takes away
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(file)) from error
    try:
        with open(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if old:
            with suppress(OSError):  # some file systems know no permissions
                shutil.copymode(file, temporary)
        yield
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that its place holds all of it, or what was there before.

    Raises:
        OSError: It can't be written.
    """
    with written_aside(file, data):
        pass
