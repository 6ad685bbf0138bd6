"""How much memory this process may still take: MLX ends it without a word when there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Address space that BLAS and threads ask for once work begins; measured at 240 MB on two cores.
RESERVED = 256 << 20


def free_memory() -> tuple[int, str]:
    """Bytes that this process may still take, and what limits them; negative if none.

    The least of: what RLIMIT_AS leaves (``ulimit -v``), what a container's limit leaves, and what
    the system has available, or, where it does not say, all of the machine's memory.
    """
    bounds = [(_machine_memory(), "this machine's memory")]
    address_space = _address_space()
    if address_space is not None:
        bounds.append((address_space - RESERVED, "the limit on address space (ulimit -v)"))
    container = _container_memory()
    if container is not None:
        bounds.append((container, "the container's memory limit"))
    return min(bounds)


def _machine_memory() -> int:
    """Available memory on Linux; elsewhere all there is, which a Mac shares with its GPU."""
    try:
        text = Path("/proc/meminfo").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return sys.maxsize


def _address_space() -> int | None:
    """What RLIMIT_AS leaves, where it is set and the system says how much is taken."""
    try:
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - taken


def _container_memory() -> int | None:
    """What a cgroup's limit leaves, file caches that can be dropped counted as free."""
    for limit, taken, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most, used = int((root / limit).read_text()), int((root / taken).read_text())
            stat = dict(line.split() for line in (root / statistics).read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such file, or "max": no limit
        return most - used + int(stat.get("inactive_file", 0))
    return None
