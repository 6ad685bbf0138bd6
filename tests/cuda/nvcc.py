"""Compiles CUDA C++ for a Hopper GPU, and reads the machine code back."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = "sm_90a"  # H100, H200
STAND_INS = Path(__file__).parent / "include"  # for MLX's own header
NVCC_HINT = "nvcc is not on PATH (it comes with NVIDIA's CUDA toolkit)"
DISASSEMBLER_HINT = (
    "nvdisasm is not on PATH; it comes with the CUDA toolkit and with the package "
    "nvidia-cuda-nvdisasm (`pip install nvidia-cuda-nvdisasm`)"
)


def find_nvcc() -> str | None:
    """NVIDIA's compiler."""
    return shutil.which("nvcc")


def find_disassembler() -> str | None:
    """NVIDIA's disassembler, on PATH or in its package."""
    if (path := shutil.which("nvdisasm")) is not None:
        return path
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        for file in sorted(Path(folder).glob("*/bin/nvdisasm")):
            return str(file)
    return None


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of registers that are kept in memory.
        disassembly: The code as text with the lines that instructions come from; empty if it was
            not asked for.
    """

    registers: int
    spilled: int
    disassembly: str


def compile_cuda(source: str, read_back: bool = False) -> Compiled:
    """Compile the CUDA C++ of one kernel.

    Raises:
        RuntimeError: It does not compile, or there is no compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        said = _compile(source, cubin, ["-O3", "-lineinfo", "-cubin", "--resource-usage"])
        registers = re.search(r"Used (\d+) registers", said)
        spilled = re.search(r"(\d+) bytes spill stores", said)
        return Compiled(
            int(registers[1]) if registers else 0,
            int(spilled[1]) if spilled else 0,
            _disassemble(cubin) if read_back else "",
        )


def ptx_of(source: str) -> str:
    """The code that NVIDIA's compiler makes of a kernel before it chooses instructions.

    Raises:
        RuntimeError: It does not compile, or there is no compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        _compile(source, ptx, ["-ptx"])
        return ptx.read_text(encoding="utf-8")


def _compile(source: str, to: Path, flags: list[str]) -> str:
    """Have nvcc write a file; returns what it said."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"[nvcc] {NVCC_HINT}.")
    file = to.parent / "kernel.cu"
    file.write_text(source, encoding="utf-8")
    # 177: constants of shared headers that this kernel does not use.
    command = [nvcc, "-std=c++17", f"-arch={ARCHITECTURE}", f"-I{STAND_INS}", *flags]
    command += ["-diag-suppress", "177", "--expt-relaxed-constexpr", "-o", str(to), str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = result.stdout + result.stderr
        raise RuntimeError(f"[nvcc] the kernel was refused:\n{said[:6000]}")
    return result.stdout + result.stderr


def _disassemble(cubin: Path) -> str:
    program = find_disassembler()
    if program is None:
        raise RuntimeError(f"[compile_cuda] {DISASSEMBLER_HINT}.")
    result = subprocess.run([program, "-gi", "-c", str(cubin)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"[compile_cuda] nvdisasm failed:\n{result.stderr[:2000]}")
    return result.stdout
