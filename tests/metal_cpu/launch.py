"""Loads a compiled kernel and runs it over guarded memory: the Python side of runtime/."""

from __future__ import annotations

import ctypes as c
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .errors import FAULTS, Diagnosis, source_lines

Placement = Literal["end", "start", "unaligned"]

_GUARD = 4 << 30  # inaccessible bytes on each side of a buffer: no 32-bit index jumps over them
_MAX_FAULTS = 32
_INPUT, _OUTPUT = 0, 1
_POISON = b"\xff"  # NaN in every floating-point type
_lock = threading.Lock()  # the runtime has one set of fibers


@dataclass(frozen=True)
class Traffic:
    """Bytes that a kernel moved between one buffer and its threads.

    Attributes:
        loaded: Sum over all threads. A value that 32 lanes load counts 32 times.
        loaded_distinct: Bytes loaded by any thread, each counted once.
        loaded_per_threadgroup: Each byte once for every threadgroup that loads it: what a GPU
            fetches if its caches keep nothing from one threadgroup to the next.
        stored: Sum over all threads.
        stored_distinct: Bytes stored by any thread, each counted once.
    """

    loaded: int = 0
    loaded_distinct: int = 0
    loaded_per_threadgroup: int = 0
    stored: int = 0
    stored_distinct: int = 0


@dataclass
class Memory:
    """One buffer of a launch. `data` is what it holds before, and after, the kernel."""

    name: str
    data: bytes
    item_size: int
    is_output: bool
    is_initialised: bool = True
    placement: Placement = "end"
    traffic: Traffic = field(default_factory=Traffic)
    overrun: int | None = None  # a byte just outside that was written, from the start


@dataclass(frozen=True)
class LaunchResult:
    diagnoses: list[Diagnosis]
    threadgroup_bytes: int


class _Traffic(c.Structure):
    _fields_ = [
        (name, c.c_uint64)
        for name in (
            "loaded",
            "loaded_distinct",
            "loaded_per_threadgroup",
            "stored",
            "stored_distinct",
        )
    ]


class _Region(c.Structure):
    _fields_ = [
        ("start", c.c_void_p),
        ("size", c.c_size_t),
        ("kind", c.c_int),
        ("granularity", c.c_int),
        ("initialised", c.c_int),
        ("name", c.c_char_p),
        ("traffic", _Traffic),
    ]


class _Fault(c.Structure):
    _fields_ = [
        ("kind", c.c_int),
        ("site", c.c_int),
        ("region", c.c_int),
        ("is_write", c.c_int),
        ("a", c.c_long),
        ("b", c.c_long),
        ("threadgroup", c.c_uint32 * 3),
        ("thread", c.c_uint32),
        ("pc", c.c_size_t),
        ("other_pc", c.c_size_t),
        ("other_thread", c.c_int),
        ("other_is_elsewhere", c.c_int),
        ("variable_name", c.c_char_p),
    ]


class _Options(c.Structure):
    _fields_ = [
        ("grid", c.c_uint32 * 3),
        ("threadgroup", c.c_uint32 * 3),
        ("seed", c.c_uint64),
        ("checked", c.c_int),
        ("divergent_simd", c.c_int),
        ("byte_cells", c.c_int),
        ("timeout_s", c.c_double),
    ]


class _Mapping(c.Structure):
    _fields_ = [("base", c.c_void_p), ("size", c.c_size_t)]


@functools.cache
def _load_runtime(path: Path) -> c.CDLL:
    runtime = c.CDLL(str(path), mode=c.RTLD_GLOBAL)  # kernels find mcpu_* and __tsan_* in it
    runtime.mcpu_map.restype = c.c_void_p
    runtime.mcpu_map.argtypes = [c.c_size_t, c.c_size_t, c.c_void_p]
    runtime.mcpu_make_readonly.argtypes = [c.c_void_p, c.c_size_t]
    return runtime


@functools.cache
def _load_kernel(path: Path) -> c.CDLL:
    return c.CDLL(str(path))


class _Mapped:
    """A Memory placed between guard pages."""

    def __init__(self, runtime: c.CDLL, memory: Memory) -> None:
        self.runtime, self.memory, self.mapping = runtime, memory, _Mapping()
        size = len(memory.data)
        start = runtime.mcpu_map(size, _GUARD, c.byref(self.mapping))
        if start is None:
            raise MemoryError(f"cannot map {size} bytes for '{memory.name}'")
        self.end = self.mapping.base + self.mapping.size - _GUARD
        self.address: int = start
        if memory.placement == "end":  # aligned as MLX's buffers are
            self.address = (self.end - size) & ~15
        elif memory.placement == "unaligned":  # as a slice of an array may be: to its elements only
            self.address = ((self.end - size - memory.item_size) & ~15) + memory.item_size
        c.memmove(self.address, memory.data, size)
        if not memory.is_output:
            runtime.mcpu_make_readonly(c.byref(self.mapping), _GUARD)

    def region(self) -> _Region:
        memory = self.memory
        return _Region(
            start=self.address,
            size=len(memory.data),
            kind=_OUTPUT if memory.is_output else _INPUT,
            granularity=memory.item_size,
            initialised=memory.is_initialised,
        )

    def read_back(self, traffic: _Traffic) -> None:
        memory = self.memory
        memory.traffic = Traffic(*(getattr(traffic, name) for name, *_ in _Traffic._fields_))
        if not memory.is_output:
            return
        size, first = len(memory.data), self.mapping.base + _GUARD
        before = c.string_at(first, self.address - first)
        after = c.string_at(self.address + size, self.end - self.address - size)
        if after.strip(_POISON):
            memory.overrun = size + len(after) - len(after.lstrip(_POISON))
        elif before.strip(_POISON):
            memory.overrun = len(before.rstrip(_POISON)) - 1 - len(before)
        memory.data = c.string_at(self.address, size)

    def unmap(self) -> None:
        self.runtime.mcpu_unmap(c.byref(self.mapping))


def poison(size: int) -> bytes:
    """What an output holds before a kernel writes it."""
    return _POISON * size


def launch(
    runtime_path: Path,
    kernel_path: Path,
    memories: Sequence[Memory],
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    seed: int,
    checked: bool,
    divergent_simd: bool,
    timeout_s: float,
) -> LaunchResult:
    """Runs a compiled kernel; the memories' data, traffic and overrun are updated."""
    runtime, kernel = _load_runtime(runtime_path), _load_kernel(kernel_path)
    options = _Options(
        grid=(c.c_uint32 * 3)(*grid),
        threadgroup=(c.c_uint32 * 3)(*threadgroup),
        seed=seed,
        checked=checked,
        divergent_simd=divergent_simd,
        timeout_s=timeout_s,
    )
    faults = (_Fault * _MAX_FAULTS)()
    used = c.c_size_t()
    with _lock:
        count = _launch_once(runtime, kernel, memories, options, faults, used)
        if count < 0:
            options.byte_cells = True
            count = _launch_once(runtime, kernel, memories, options, faults, used)
    names = [memory.name for memory in memories]
    return LaunchResult(_diagnose(kernel_path, kernel, names, faults[:count]), used.value)


def _launch_once(
    runtime: c.CDLL,
    kernel: c.CDLL,
    memories: Sequence[Memory],
    options: _Options,
    faults: c.Array[_Fault],
    used_threadgroup_bytes: c.c_size_t,
) -> int:
    mapped: list[_Mapped] = []
    try:
        mapped.extend(_Mapped(runtime, memory) for memory in memories)
        regions = (_Region * len(mapped))(*(m.region() for m in mapped))
        pointers = (c.c_void_p * len(mapped))(*(m.address for m in mapped))
        count: int = runtime.mcpu_launch(
            kernel.mcpu_entry,
            pointers,
            regions,
            len(mapped),
            c.byref(options),
            faults,
            c.byref(used_threadgroup_bytes),
        )
        if count >= 0:
            for m, region in zip(mapped, regions, strict=True):
                m.read_back(region.traffic)
        return count
    finally:
        for m in mapped:
            m.unmap()


def _diagnose(
    path: Path, kernel: c.CDLL, buffers: Sequence[str], faults: Sequence[_Fault]
) -> list[Diagnosis]:
    base = _load_address(kernel)
    addresses = [max(pc - base, 1) for fault in faults for pc in (fault.pc, fault.other_pc)]
    lines = source_lines(path, addresses)
    return [
        Diagnosis(
            kind=FAULTS[fault.kind],
            line=fault.site >> 9 or lines[2 * i],  # a call's line is known, an access's looked up
            buffer=_region_name(fault, buffers),
            is_write=bool(fault.is_write),
            a=fault.a,
            b=fault.b,
            threadgroup=tuple(fault.threadgroup),
            thread=fault.thread,
            other_thread=fault.other_thread,
            other_is_elsewhere=bool(fault.other_is_elsewhere),
            other_line=lines[2 * i + 1],
        )
        for i, fault in enumerate(faults)
    ]


def _region_name(fault: _Fault, buffers: Sequence[str]) -> str:
    if 0 <= fault.region < len(buffers):
        return buffers[fault.region]
    return bytes(fault.variable_name or b"").decode()


class _DynamicInfo(c.Structure):
    _fields_ = [
        ("file_name", c.c_char_p),
        ("load_address", c.c_size_t),
        ("symbol_name", c.c_char_p),
        ("symbol_address", c.c_size_t),
    ]


def _load_address(library: c.CDLL) -> int:
    info = _DynamicInfo()
    c.CDLL(None).dladdr(library.mcpu_entry, c.byref(info))
    return int(info.load_address)
