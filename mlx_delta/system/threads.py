"""How many threads the BLAS takes: as many as there are processors with nothing else to do.

OpenBLAS takes one for each core of the machine, and its threads wait for each other by giving up
the processor. Where other processes compute as well, or a container may use fewer cores than the
machine has, every product then waits for a time slice of the system's: the bundled demo read 80
tokens a second with two threads on two busy cores, and 384 with one.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from .blas import set_blas_threads

# Whoever sets one of these has chosen.
VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


def choose_threads() -> int | None:
    """Set the BLAS's threads; returns the number, or ``None`` if it was not for us to choose."""
    if any(os.environ.get(name) for name in VARIABLES):
        return None
    threads = max(1, available_processors() - busy_processors())
    return threads if set_blas_threads(threads) else None


def available_processors() -> int:
    """Processors that this process may use: by affinity, and by its container's quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        count = os.cpu_count() or 1
    quota = _quota()
    return max(1, min(count, math.ceil(quota))) if quota else count


def busy_processors() -> int:
    """Processors that other processes use, by the system's average over the last minute.

    An average, since a single look would not see those that wait for a disk just now. It counts
    what this process did in that minute as well, so a second model may get a thread less.
    """
    try:
        return round(os.getloadavg()[0])
    except (AttributeError, OSError):
        return 0


def _quota() -> float | None:
    """Processors that the container's quota amounts to; ``None`` without one."""
    root = Path("/sys/fs/cgroup")
    try:
        most, period = (root / "cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return quota / period_us if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
