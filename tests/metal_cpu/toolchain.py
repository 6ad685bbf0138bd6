"""Finds a C++ compiler, and compiles into a cache that several processes may share."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

RUNTIME = Path(__file__).parent / "runtime"
MLX_INCLUDE = Path(mx.__file__).parent / "include"
CACHE_VARIABLE = "METAL_CPU_CACHE"
COMPILER_VARIABLE = "METAL_CPU_CXX"
# What every kernel includes: Metal's standard library, and MLX's utilities.
HEADERS = ("msl/execute.h", "mlx/backend/metal/kernels/utils.h")
INSTALL_HINT = (
    "the Metal bench needs a C++ compiler: `pip install ziglang`, or clang++ 19 or newer, "
    "or g++ 12 or newer (without the strict syntax pass) on PATH"
)


class CompileError(RuntimeError):
    """A kernel, or the bench's own runtime, does not compile."""


@dataclass(frozen=True)
class Compiler:
    """A compiler and how to call it.

    Attributes:
        command: What compiles C++.
        syntax_command: What checks syntax only, which `zig c++` cannot; empty for g++, whose front
            end has no address spaces.
    """

    family: str  # "clang", "zig" or "g++"
    version: str
    command: tuple[str, ...]
    syntax_command: tuple[str, ...] = ()

    @property
    def is_gcc(self) -> bool:
        return self.family == "g++"

    def __str__(self) -> str:
        return f"{self.family} {self.version}"


@functools.cache
def find_compiler() -> Compiler | None:
    """The compiler that the environment names, or the first of clang, zig and g++ that is there."""
    if (chosen := os.environ.get(COMPILER_VARIABLE)) is not None:
        compiler = _zig() if chosen == "zig" else _on_path(chosen)
        if compiler is None:
            raise CompileError(f"{COMPILER_VARIABLE}={chosen}, but it is missing or too old")
        return compiler
    names = ["clang++", *(f"clang++-{version}" for version in range(29, 18, -1))]
    found = (_on_path(name) for name in names)
    return next((c for c in found if c is not None), None) or _zig() or _on_path("g++")


def _on_path(name: str) -> Compiler | None:
    if (path := shutil.which(name)) is None:
        return None
    about = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.\d+\.\d+", about)
    if match is None or "Apple" in about:
        return None
    is_clang = "clang" in about
    if int(match[1]) < (19 if is_clang else 12):
        return None
    return Compiler("clang" if is_clang else "g++", match[0], (path,), (path,) if is_clang else ())


def _zig() -> Compiler | None:
    """The package `ziglang` is a clang that pip can install."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    zig = str(Path(spec.origin).parent / "zig")
    target = f"--target={platform.machine()}-linux-gnu"
    return Compiler("zig", version("ziglang"), (zig, "c++"), (zig, "clang", target))


def cache_directory() -> Path:
    """Where compiled kernels are kept: METAL_CPU_CACHE, or a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get(CACHE_VARIABLE) or os.path.join(base, "metal-cpu-bench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def bench_version() -> str:
    """A digest of what every kernel is compiled with: the bench's headers, and MLX's."""
    digest = hashlib.sha256(version("mlx").encode())
    for path in sorted(p for p in RUNTIME.rglob("*") if p.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cached(key: Sequence[str], suffix: str) -> Path:
    """The place in the cache for what `key` leads to."""
    digest = hashlib.sha256("\0".join([bench_version(), *key]).encode()).hexdigest()[:24]
    return cache_directory() / f"{digest}{suffix}"


def write_atomically(path: Path, content: str) -> None:
    """Writes a file that other processes see either whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    with os.fdopen(handle, "w") as file:
        file.write(content)
    os.replace(temporary, path)


def call_compiler(command: Sequence[str]) -> str:
    """Runs a compiler. Returns its warnings; raises CompileError with its errors."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise CompileError(process.stderr or f"{command[0]}: exit status {process.returncode}")
    return process.stderr


def build_library(
    compiler: Compiler, sources: Sequence[Path], flags: Sequence[str], headers: Sequence[str] = ()
) -> Path:
    """Compiles sources into a shared library, unless the cache has it.

    Args:
        compiler: What compiles.
        sources: Files.
        flags: How.
        headers: What the sources include first; read once and for all where the compiler can.
    """
    flags = [*_common_flags(compiler), *flags]
    contents = [source.read_text() for source in sources]
    library = cached([str(compiler), *compiler.command, *flags, *contents], ".so")
    if not library.exists():
        read = _precompiled(compiler, headers, flags) if headers and not compiler.is_gcc else []
        paths = [str(source) for source in sources]
        _compile_into(library, [*compiler.command, *flags, *read, "-shared", *paths])
    return library


def _compile_into(path: Path, command: Sequence[str]) -> None:
    """Several processes may do this at once: whoever is last, all are right."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        call_compiler([*command, "-o", temporary])
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@functools.cache
def _header_places() -> list[str]:
    """A precompiled header stands for these very files: where they are, and since when."""
    return [f"{p} {p.stat().st_mtime_ns}" for p in (*sorted(RUNTIME.rglob("*")), MLX_INCLUDE)]


def _precompiled(compiler: Compiler, headers: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The flags with which a compiler takes headers from where it has read them already."""
    text = "".join(f'#include "{header}"\n' for header in headers)
    key = [str(compiler), *compiler.command, *flags, text, *_header_places()]
    path = cached(key, ".pch")
    if not path.exists():
        source = cached(key, ".h")
        write_atomically(source, text)
        _compile_into(path, [*compiler.command, *flags, "-x", "c++-header", str(source)])
    return ["-include-pch", str(path)]


def _common_flags(compiler: Compiler) -> list[str]:
    flags = ["-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-U_FORTIFY_SOURCE"]
    if platform.machine() == "x86_64":  # v3 (any machine since 2015): half has instructions
        flags.append("-march=x86_64_v3" if compiler.family == "zig" else "-march=x86-64-v3")
    return flags if compiler.is_gcc else [*flags, "-nostdinc++", "-nostdlib++"]


def build_runtime(compiler: Compiler) -> Path:
    """The scheduler and the access checker, shared by all kernels of a process."""
    return build_library(compiler, [RUNTIME / "scheduler.cpp", RUNTIME / "checker.cpp"], ["-O2"])


def include_flags() -> list[str]:
    """Where `#include` looks: the stand-ins first, then MLX's own Metal headers."""
    return [f"-I{RUNTIME / 'include'}", f"-I{RUNTIME}", f"-isystem{MLX_INCLUDE}"]


def kernel_flags(compiler: Compiler, checked: bool) -> list[str]:
    """How a kernel is compiled: as close to Metal's semantics as C++ gets, and with traps."""
    flags = [
        *include_flags(),
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-strict-aliasing",
        "-fno-finite-loops",  # a mutation's endless loop must not vanish
        "-ftrivial-auto-var-init=pattern",  # an uninitialised variable is not 0 by luck
        "-g1",  # line numbers
        "-O1" if checked else "-O2",
    ]
    if compiler.is_gcc:
        flags += ["-w", "-fpermissive", "-fsingle-precision-constant"]
        flags += ["-fsanitize=bounds,alignment,integer-divide-by-zero"]
        flags += ["-fsanitize-undefined-trap-on-error"]
        # The driver would link GCC's own runtime for -fsanitize=thread.
        return flags + (["-fsanitize=thread", "-nodefaultlibs", "-lm", "-lc"] if checked else [])
    flags += ["-Wno-everything", "-fsanitize-trap=all"]
    flags += ["-fsanitize=bounds,alignment,integer-divide-by-zero,shift-exponent"]
    # Otherwise all traps of a function share one instruction, and one line number.
    if compiler.family == "clang" and compiler.version.startswith("19."):
        flags += ["-mllvm", "-ubsan-unique-traps"]
    else:
        flags += ["-fno-sanitize-merge=all"]
    # -Xclang: only the instrumentation, without the driver linking a runtime.
    to_front_end = ["-ffloat16-excess-precision=none", "-fbfloat16-excess-precision=none"]
    to_front_end += ["-cl-single-precision-constant"]
    if checked:
        to_front_end += ["-fsanitize=thread"]
        to_front_end += ["-mllvm", "-tsan-instrument-read-before-write=1"]
    return flags + [part for flag in to_front_end for part in ("-Xclang", flag)]


def build_kernel(
    compiler: Compiler, source: str, checked: bool, headers: Sequence[str] = HEADERS
) -> Path:
    """Compiles a kernel's C++ translation unit, which includes some headers first."""
    unit = cached([source], ".cpp")
    if not unit.exists():
        write_atomically(unit, source)
    return build_library(compiler, [unit], kernel_flags(compiler, checked), headers)
