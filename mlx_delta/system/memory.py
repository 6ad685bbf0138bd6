"""How much memory this process may still take: MLX ends it without a word when there is none."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

# Address space that BLAS and threads ask for once work begins; measured at 240 MB on two cores.
RESERVED = 256 << 20


# What --memory-limit allows this process, while one is set.
_limit: tuple[int, str] | None = None

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1 << 10 * power for power, unit in enumerate("KMGT", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?)B?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it: 6GB, 512 MiB, 4000000.

    Raises:
        ValueError: It is none, or is 0.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 1 or size >= 1 << 62:
        raise ValueError(f"{text!r:.40} is no number of bytes; write it like 6GB or 512MB.")
    return size


def show_bytes(size: float) -> str:
    """Bytes in words: 1.2 GB, 34 MB."""
    return f"{size / 1e9:.1f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.0f} MB"


def set_limit(size: int | None, name: str = "--memory-limit") -> None:
    """Allow this process so many bytes from now on; ``None``: as many as there are.

    MLX then keeps little memory that it does not use.
    """
    global _limit
    _limit = None if size is None else (size, f"{name} {show_bytes(size)}")
    if size is not None:
        mx = importlib.import_module("mlx.core")
        mx.set_cache_limit(size // 16)


def free_memory(reserved: int = RESERVED) -> tuple[int, str]:
    """Bytes that this process may still take, and what limits them; negative if none.

    The least of: what RLIMIT_AS leaves (``ulimit -v``), what a container's limit leaves, what
    :func:`set_limit` does, what an NVIDIA GPU has left, and what the system has available, or,
    where it does not say, the machine's memory less what MLX has taken.

    Args:
        reserved: Address space that will be taken anyway; none once work has begun.
    """
    bounds = [(_machine_memory(), "this machine's memory")]
    address_space = _address_space()
    if address_space is not None:
        bounds.append((address_space - reserved, "the limit on address space (ulimit -v)"))
    container = _container_memory()
    if container is not None:
        bounds.append((container, "the container's memory limit"))
    gpu = _gpu_memory()
    if gpu is not None:
        bounds.append((gpu, "the GPU's memory"))
    if _limit is not None:
        bounds.append((_limit[0] - taken_memory(), _limit[1]))
    return min(bounds)


def taken_memory() -> int:
    """Bytes of this process in memory, or, where the system does not say, of MLX's arrays."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        # What MLX keeps for later it gives back when memory is short.
        return pages * resource.getpagesize() - _of_mlx("get_cache_memory")
    except (ImportError, OSError, ValueError):
        return _of_mlx("get_active_memory")


def _of_mlx(figure: str) -> int:
    """One of MLX's figures; 0 while it is not imported."""
    mx = sys.modules.get("mlx.core")
    return 0 if mx is None else int(getattr(mx, figure)())


def _machine_memory() -> int:
    """Available memory on Linux; elsewhere what MLX leaves, which a Mac shares with its GPU."""
    try:
        text = Path("/proc/meminfo").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):
        pass
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return size - _of_mlx("get_active_memory")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return sys.maxsize


def _gpu_memory() -> int | None:
    """What a GPU with a memory of its own has left, MLX's spare memory counted as free."""
    mx = sys.modules.get("mlx.core")
    free = None if mx is None else mx.device_info().get("free_memory")
    return None if free is None else int(free) + _of_mlx("get_cache_memory")


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
