"""Runs `mx.fast.metal_kernel` kernels on the CPU, as Metal would run them on a GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import mlx.core as mx

from . import signature, strict, toolchain
from .arrays import to_bytes
from .errors import KernelFault, KernelRejected
from .launch import Memory, Placement, poison
from .rewrite import rewrite
from .running import Outputs, execute
from .signature import GeneratedKernel, SignatureError

Mode = Literal["fast", "checked"]

_VECTOR_ATTRIBUTES = {
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_in_grid",
    "threadgroups_per_grid": "threadgroups_per_grid",
    "threads_per_grid": "threads_per_grid",
    "grid_size": "threads_per_grid",
    "threads_per_threadgroup": "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup": "dispatch_threads_per_threadgroup",
}
_SCALAR_ATTRIBUTES = {
    "thread_index_in_threadgroup": "t->index_in_threadgroup",
    "thread_index_in_simdgroup": "t->lane",
    "simdgroup_index_in_threadgroup": "t->simdgroup",
    "simdgroups_per_threadgroup": "t->simdgroups",
    "dispatch_simdgroups_per_threadgroup": "t->simdgroups",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "t->lane % 4",
    "quadgroup_index_in_threadgroup": "t->index_in_threadgroup / 4",
    "quadgroups_per_threadgroup": "t->simdgroups * 8",
}


# Kept here, as `patched` and KernelSource.of replace MLX's for a while.
_build: Callable[..., Callable[..., Any]] = cast(Any, mx.fast.metal_kernel)


@dataclass(frozen=True)
class KernelSource:
    """The arguments of `mx.fast.metal_kernel`, as data, so that a test can change the source."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    compile_options: Mapping[str, str] | None = None

    def build(self) -> Callable[..., Any]:
        """The kernel, made by MLX."""
        arguments = {**asdict(self), "input_names": list(self.input_names)}
        arguments["output_names"] = list(self.output_names)
        return _build(**arguments)

    def edited(self, edit: Callable[[str], str]) -> KernelSource:
        """The same kernel with its header and its body edited as one text."""
        joint = "\n/*body*/\n"
        header, _, body = edit(self.header + joint + self.source).partition(joint)
        return replace(self, header=header, source=body)

    @classmethod
    def of(cls, builder: Callable[[], Any]) -> KernelSource:
        """What a function that builds and returns one kernel passes to MLX.

        Args:
            builder: The function; if it is cached, its `__wrapped__`.
        """
        with (
            mock.patch.object(mx.fast, "metal_kernel", cls),
            mock.patch.object(mx.metal, "is_available", lambda: True),  # where CUDA is, too
        ):
            source = builder()
            source = getattr(source, "kernel", source)  # ours are within what tries them
        if not isinstance(source, cls):
            raise TypeError(f"[KernelSource.of] {builder} returned {source!r}, not a kernel")
        return source


class MetalBench:
    """Runs kernels as Metal would, with checks that a GPU does not make.

    On a machine with Metal, `run` runs the kernel on the GPU instead, whatever the mode.

    Args:
        compiler: Which compiler to use; by default the first that is installed.
        strict: Whether `run` first has each kernel's syntax checked (needs clang or zig).
    """

    def __init__(self, compiler: toolchain.Compiler | None = None, strict: bool = True) -> None:
        self.on_gpu = mx.metal.is_available()
        self._compiler = compiler or toolchain.find_compiler()
        self.strict = strict and (self.on_gpu or bool(self.compiler.syntax_command))

    @property
    def compiler(self) -> toolchain.Compiler:
        """The compiler in use, without which only a GPU can run anything."""
        if self._compiler is None:
            raise toolchain.CompileError(toolchain.INSTALL_HINT)
        return self._compiler

    def run(
        self,
        kernel: Callable[..., Any] | KernelSource,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        stream: Any = None,
        verbose: bool = False,
        mode: Mode = "fast",
        seed: int = 0,
        placement: Placement = "end",
        divergent_simd: bool = False,
        allow_unwritten: bool = False,
        timeout_s: float = 60.0,
    ) -> Outputs:
        """Runs a kernel once. The arguments up to `verbose` are those of the kernel itself.

        Args:
            kernel: What `mx.fast.metal_kernel` returned, or a KernelSource.
            mode: "fast" runs optimised code; out-of-bounds accesses hit guard pages, and memory
                that was never written holds NaN. "checked" follows every access, which finds races,
                uninitialised reads, unwritten outputs and any out-of-bounds access, and counts
                bytes.
            seed: Picks the order in which threads run; 0 is in order.
            placement: Where inputs lie. "end": aligned to 16 bytes, guard page behind; "start":
                guard page in front; "unaligned": aligned to their elements only, as slices may be.
            divergent_simd: Allows simd functions that only some lanes of a simdgroup reach.
            allow_unwritten: Allows a kernel to leave parts of its outputs unwritten.
            timeout_s: CPU seconds before the kernel is stopped.

        Raises:
            KernelRejected: Metal's compiler would refuse the source.
            KernelFault: the kernel did something that Metal leaves undefined.
        """
        if isinstance(kernel, KernelSource):
            kernel = kernel.build()
        call: dict[str, Any] = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": grid,
            "threadgroup": threadgroup,
        }
        if template is not None:
            call["template"] = template
        if init_value is not None:
            call["init_value"] = init_value
        if self.on_gpu:
            return Outputs(kernel(inputs=inputs, stream=stream, verbose=verbose, **call), {}, 0)

        _check_launch(grid, threadgroup)
        generated = signature.parse(signature.capture(kernel, inputs, **call))
        if verbose:
            print(generated.text)
        library = self.compile(generated, checked=mode == "checked")

        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        memories = _place(generated, arrays, output_shapes, output_dtypes, init_value, placement)
        return execute(
            self.compiler,
            library,
            generated.source,
            memories,
            output_shapes,
            output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            checked=mode == "checked",
            seed=seed,
            divergent_simd=divergent_simd,
            allow_unwritten=allow_unwritten,
            timeout_s=timeout_s,
        )

    def check(
        self,
        kernel: Callable[..., Any] | KernelSource,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        placements: Sequence[Placement] = ("end", "start", "unaligned"),
        **call: Any,
    ) -> Outputs:
        """Runs a kernel in every way, which must not change its outputs by a single bit.

        Args:
            kernel: As for `run`.
            seeds: Orders of threads to run it under in checked mode, one at least.
            placements: Where its inputs are to lie in fast mode.
            **call: The arguments of `run` but for mode, seed and placement.

        Returns:
            The outputs and the traffic of the first checked run.

        Raises:
            KernelRejected: as `run`.
            KernelFault: as `run`, and if two runs differ.
        """
        result = self.run(kernel, mode="checked", seed=seeds[0], **call)
        ways: list[dict[str, Any]] = [{"mode": "fast", "placement": p} for p in placements]
        ways += [{"mode": "checked", "seed": seed} for seed in seeds[1:]]
        for way in ways:
            for index, output in enumerate(self.run(kernel, **call, **way)):
                if to_bytes(output) != to_bytes(result[index]):
                    raise KernelFault([f"output {index} differs when run with {way}"])
        return result

    def check_syntax(self, kernel: Callable[..., Any] | KernelSource, **call: Any) -> None:
        """The strict pass alone, for the kernel that this call would run.

        Raises:
            KernelRejected: Metal's compiler would refuse the source.
        """
        built = kernel.build() if isinstance(kernel, KernelSource) else kernel
        if self.strict and not self.on_gpu:
            strict.check(self.compiler, signature.parse(signature.capture(built, **call)))

    def compile(self, generated: GeneratedKernel, checked: bool) -> Path:
        """Compiles MLX's source, after the strict syntax pass, into a cached library."""
        if self.strict:
            strict.check(self.compiler, generated)
        try:
            return toolchain.build_kernel(self.compiler, translation_unit(generated), checked)
        except toolchain.CompileError as error:
            raise KernelRejected(f"does not compile:\n{str(error)[:6000]}") from None

    def bind(
        self, kernel: Callable[..., Any] | KernelSource, **options: Any
    ) -> Callable[..., Outputs]:
        """A callable with the kernel's own arguments that runs it here with `run`'s options."""

        def bound(**call: Any) -> Outputs:
            return self.run(kernel, **call, **options)

        return bound

    @contextlib.contextmanager
    def patched(self, **options: Any) -> Iterator[None]:
        """Makes MLX look like a GPU build whose kernels run here.

        Kernels that are built within the context run on the bench, even later: import the module
        that builds them, or clear its cache, inside.
        """
        if self.on_gpu:
            yield
            return

        def build_bound(**arguments: Any) -> Callable[..., Outputs]:
            return self.bind(_build(**arguments), **options)

        with (
            mock.patch.object(mx.fast, "metal_kernel", build_bound),
            mock.patch.object(mx.metal, "is_available", lambda: True),
            mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        ):
            yield


def _check_launch(grid: Sequence[int], threadgroup: Sequence[int]) -> None:
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if len(grid) != 3 or min(grid) < 1 or len(threadgroup) != 3 or min(threadgroup) < 1:
        raise ValueError(
            f"[MetalBench] grid and threadgroup must be positive but got {grid} and {threadgroup}."
        )
    if threads > 1024:
        raise KernelRejected(f"threadgroup {threadgroup} has {threads} threads, more than 1024.")


def translation_unit(generated: GeneratedKernel) -> str:
    """C++ that defines the kernel and an entry point with a plain C signature."""
    arguments = []
    for index, buffer in enumerate(generated.buffers):
        pointer = f"({'const ' if buffer.is_const else ''}{buffer.type}*)buffers[{index}]"
        arguments.append(f"*{pointer}" if buffer.is_reference else pointer)
    for attribute in generated.attributes:
        if (field := _VECTOR_ATTRIBUTES.get(attribute)) is not None:
            arguments.append(f"uint3(t->{field}[0], t->{field}[1], t->{field}[2])")
        elif attribute in _SCALAR_ATTRIBUTES:
            arguments.append(_SCALAR_ATTRIBUTES[attribute])
        else:
            raise SignatureError(f"the thread attribute {attribute} is not supported")
    return "\n".join(
        [
            *(f'#include "{header}"' for header in toolchain.HEADERS),
            '#line 1 "kernel.metal"',
            rewrite(generated.source),
            '#line 1 "entry"',
            'extern "C" void mcpu_entry(void** buffers, ThreadAttributes* t) {',
            f"  {generated.function}({', '.join(arguments)});",
            "}\n",
        ]
    )


def _row_strides(shape: Sequence[int]) -> list[int]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return strides


# What MLX passes besides an input `x` if the body names x_shape, x_strides or x_ndim.
_METADATA: dict[str, Callable[[Sequence[int]], mx.array]] = {
    "_shape": lambda shape: mx.array(list(shape), mx.int32),
    "_strides": lambda shape: mx.array(_row_strides(shape), mx.int64),
    "_ndim": lambda shape: mx.array(len(shape), mx.int32),
}


def _place(
    generated: GeneratedKernel,
    arrays: Sequence[mx.array],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    init_value: float | None,
    placement: Placement,
) -> list[Memory]:
    """What each of the generated function's buffers holds, in its order."""
    names = [buffer.name for buffer in generated.buffers]
    given: list[tuple[str, mx.array]] = []
    for index, array in enumerate(arrays):
        name = names.pop(0)
        given.append((name, array))
        later = len(arrays) - index - 1 + len(output_shapes)  # buffers that are not metadata
        for suffix, value in _METADATA.items():
            if len(names) > later and names[0] == name + suffix:
                given.append((names.pop(0), value(array.shape)))
    memories = [
        Memory(name, to_bytes(array), array.dtype.size, is_output=False, placement=placement)
        for name, array in given
    ]
    for name, shape, dtype in zip(names, output_shapes, output_dtypes, strict=True):
        if init_value is None:
            initial = poison(math.prod(shape) * dtype.size)
        else:
            initial = to_bytes(mx.full(shape, init_value, dtype))
        memories.append(
            Memory(name, initial, dtype.size, is_output=True, is_initialised=init_value is not None)
        )
    return memories
