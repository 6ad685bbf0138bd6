"""Memory bandwidth of Apple's chips, which bounds how fast a model can decode.

Figures are Apple's own, in GB/s (10^9 bytes), as its specifications state them. iPads with an
M-series chip have that chip's. Of iPhones Apple states none, so there is none here.

Sources:
    M1, M2: https://github.com/ggml-org/llama.cpp/pull/1642 and
        https://github.com/ggml-org/llama.cpp/discussions/4167
    M3: https://en.wikipedia.org/wiki/Apple_M3,
        https://gigazine.net/gsc_news/en/20231101-apple-m3-pro-memory-bandwidth
    M4: https://www.macrumors.com/2024/10/30/apple-announces-m4-max-chip/,
        https://github.com/ggml-org/llama.cpp/issues/27525 (the smaller M4 Max)
    M5, M6: https://github.com/rlindsey2/sunkcost/blob/main/data/hardware.json, which cites
        https://www.apple.com/mac-studio/specs/ and https://www.apple.com/mac-mini/specs/
"""

from __future__ import annotations

import ctypes
import difflib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

# What decoding reaches of a chip's bandwidth in practice, as shares of it.
REACHED = (0.70, 0.85)
_MULTIPROCESSORS = 16  # the attribute's number in CUDA's driver


@dataclass(frozen=True)
class Chip:
    """A chip.

    Attributes:
        name: As macOS states it, without "Apple".
        gb_per_s: Memory bandwidth in GB/s.
        gpu_cores: Where chips of one name differ: this one's.
        memory: Where they differ by memory: this one's, in words.
    """

    name: str
    gb_per_s: float
    gpu_cores: int | None = None
    memory: str = ""

    @property
    def family(self) -> str:
        """``M4`` of ``M4 Max``."""
        return self.name.split()[0]

    @property
    def label(self) -> str:
        """The name, and what tells the chip from others of that name."""
        variant = f"{self.gpu_cores}-core GPU" if self.gpu_cores else self.memory
        return f"{self.name} ({variant})" if variant else self.name


CHIPS = (
    Chip("M1", 68),
    Chip("M1 Pro", 200),
    Chip("M1 Max", 400),
    Chip("M1 Ultra", 800),
    Chip("M2", 100),
    Chip("M2 Pro", 200),
    Chip("M2 Max", 400),
    Chip("M2 Ultra", 800),
    Chip("M3", 100),
    Chip("M3 Pro", 150),
    Chip("M3 Max", 300, gpu_cores=30),
    Chip("M3 Max", 400, gpu_cores=40),
    Chip("M3 Ultra", 819),
    Chip("M4", 120),
    Chip("M4 Pro", 273),
    Chip("M4 Max", 410, gpu_cores=32),
    Chip("M4 Max", 546, gpu_cores=40),
    Chip("M5", 153),
    Chip("M5 Pro", 307),
    Chip("M5 Max", 460, gpu_cores=32),
    Chip("M5 Max", 614, gpu_cores=40),
    Chip("M5 Ultra", 1200),
    Chip("M6", 153, memory="16 GB"),
    Chip("M6", 170, memory="24 GB or more"),
)


def find_chips(names: Sequence[str]) -> list[Chip]:
    """The chips that names mean: one (``M4 Pro``), a family (``M4``), or ``all``.

    Raises:
        ValueError: A name is unknown, with the nearest ones.
    """
    found: list[Chip] = []
    for name in names:
        wanted = _plain(name)
        families = {chip.family.lower() for chip in CHIPS}
        chips = [
            chip
            for chip in CHIPS
            if wanted in ("all", _plain(chip.name), _plain(chip.label))
            or (wanted in families and wanted == chip.family.lower())
        ]
        if not chips:
            known = list(dict.fromkeys(chip.name for chip in CHIPS))
            near = difflib.get_close_matches(wanted, [n.lower() for n in known], n=2, cutoff=0.4)
            meant = [n for n in known if n.lower() in near]
            hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
            raise ValueError(
                f"[find_chips] unknown chip {name!r}{hint}; known are all, {', '.join(known)}."
            )
        found += [chip for chip in chips if chip not in found]
    return found


def _plain(name: str) -> str:
    """A chip's name in lower case, however it was written: ``Apple M4-Max`` and ``m4 max``."""
    return " ".join(name.lower().replace("-", " ").removeprefix("apple ").split())


def this_chip() -> Chip | None:
    """This machine's chip; ``None`` without one of Apple's, or where its bandwidth is not known.

    Where macOS does not tell which of several chips of a name it is, the one with most bandwidth.
    """
    if platform.system() != "Darwin":
        return None
    name = _plain(chip_name())
    chips = [chip for chip in CHIPS if _plain(chip.name) == name]
    cores = gpu_cores()
    chips = [chip for chip in chips if chip.gpu_cores == cores] or chips
    return max(chips, key=lambda chip: chip.gb_per_s, default=None)


def chip_name() -> str:
    """What macOS calls the chip; elsewhere the processor's architecture and number of cores."""
    if platform.system() == "Darwin":
        brand = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
        if brand:
            return brand
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


@cache
def gpu_cores() -> int | None:
    """Cores of this machine's GPU, as macOS counts them; elsewhere NVIDIA's multiprocessors.

    ``None`` where neither macOS nor NVIDIA's driver tells.
    """
    if platform.system() != "Darwin":
        return _multiprocessors()
    match = re.search(r'"gpu-core-count" = (\d+)', _output("ioreg", "-rc", "AGXAccelerator"))
    return int(match[1]) if match else None


def _multiprocessors() -> int | None:
    """Of the first GPU that NVIDIA's driver has; MLX does not say."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(count), _MULTIPROCESSORS, device):
        return None
    return count.value or None


def _output(*command: str) -> str:
    """What a command of macOS prints; nothing if it can't be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
