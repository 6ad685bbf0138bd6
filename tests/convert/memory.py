"""The most memory that this process has held."""

import re
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Bytes; on Linux not ``ru_maxrss``, which a process inherits from the one that started it."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
