"""What the bench raises, and how a diagnosis reads."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# In the order of FaultKind in runtime/abi.h.
FAULTS = (
    "data race",
    "read of uninitialised memory",
    "out-of-bounds access",
    "write to a const buffer",
    "output not written",
    "out-of-bounds access (guard page)",
    "stack overflow",
    "trap: array index, misaligned vector, shift or division by zero",
    "timeout",
    "simd function reached by only some lanes",
    "simdgroup_barrier reached by only some lanes",
    "threads exited while others wait at threadgroup_barrier",
    "threads wait at different barriers",
    "shuffle reads an inactive lane",
    "vector index out of range",
    "too much threadgroup memory",
    "simdgroup_matrix needs all 32 lanes",
)


class KernelError(Exception):
    """A kernel was refused, or did wrong while it ran: unlike what MLX raises, never expected."""


class KernelRejected(KernelError):
    """Metal's compiler would refuse the kernel."""


class KernelFault(KernelError):
    """The kernel did something that Metal leaves undefined.

    Attributes:
        diagnoses: One line for each place in the source where it happened.
    """

    def __init__(self, diagnoses: Sequence[str]) -> None:
        self.diagnoses = tuple(diagnoses)
        super().__init__("\n".join(diagnoses))


@dataclass(frozen=True)
class Diagnosis:
    """A fault as the runtime reports it; `a` and `b` mean something else for each kind."""

    kind: str
    line: int  # in the generated source; 0: unknown
    buffer: str
    is_write: bool
    a: int
    b: int
    threadgroup: tuple[int, int, int]
    thread: int
    other_thread: int  # -1: none
    other_is_elsewhere: bool  # in another threadgroup
    other_line: int

    def describe(self, source: str) -> str:
        """One line for people, quoting the kernel's source."""
        if self.kind == "output not written":
            return f"{self.kind}: {self.b} bytes of '{self.buffer}' from byte {self.a}"
        where = f"thread {self.thread} of threadgroup {self.threadgroup}"
        text = f"{self.kind}: {self._details()}{where}{_quote(source, self.line)}"
        if self.other_thread >= 0:
            elsewhere = " of another threadgroup" if self.other_is_elsewhere else ""
            text += f", against thread {self.other_thread}{elsewhere}"
            text += _quote(source, self.other_line)
        return text

    def _details(self) -> str:
        access = "write to" if self.is_write else "read of"
        if "only some lanes" in self.kind:
            return f"lanes {self.a & 0xFFFFFFFF:08x} of {self.b & 0xFFFFFFFF:08x}, "
        if self.kind == "too much threadgroup memory":
            return f"{self.a} bytes are more than {self.b}, "
        if self.kind == "vector index out of range":
            return f"element {self.a} of {self.b}, "
        if self.kind == "shuffle reads an inactive lane":
            return f"lane {self.a} of {self.b & 0xFFFFFFFF:08x}, "
        if "guard page" in self.kind:
            return f"'{self.buffer}' at byte {self.a}, " if self.buffer else ""
        if self.buffer:
            return f"{access} '{self.buffer}' bytes {self.a} to {self.a + self.b}, "
        return ""


def _quote(source: str, line: int) -> str:
    lines = source.splitlines()
    return f" at line {line} `{lines[line - 1].strip()}`" if 0 < line <= len(lines) else ""


def source_lines(library: Path, addresses: Sequence[int]) -> list[int]:
    """The kernel's source line of each return address, relative to the library; 0 if unknown.

    Needs addr2line (binutils) or llvm-symbolizer; without, diagnoses lack the line.
    """
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if tool is None or not addresses:
        return [0] * len(addresses)
    # With inlining (-i) the last kernel.metal line is the outermost; the first is the closest.
    command = [tool, "-e", str(library), "-i", "-a", *(hex(a - 1) for a in addresses)]
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    lines: list[int] = []
    for entry in answer.splitlines():
        if entry.startswith("0x"):
            lines.append(0)
        elif "kernel.metal:" in entry and lines and not lines[-1]:
            number = entry.split("kernel.metal:")[1].split()[0]
            lines[-1] = int(number) if number.isdigit() else 0
    return lines if len(lines) == len(addresses) else [0] * len(addresses)
