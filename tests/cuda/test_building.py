"""The kernels' maker: what it gives MLX on either back-end, and what CUDA would not take."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.ops import backend, launching
from mlx_delta.ops.backend import CUDA, METAL
from mlx_delta.ops.building import CudaKernel, make_kernel
from mlx_delta.ops.cuda_text import cuda_body, translated
from mlx_delta.system import chips, devices, memory

from ..gpus import seems_to_have
from ..metal_cpu import MetalBench
from ..metal_cpu.errors import KernelFault
from .execute import launch_on
from .generated import CudaArguments, Generated
from .launches import every_kernel, on_cuda

# Every thread adds its place, in the grid and in its threadgroup, to its element; all but the last
# take their neighbour's from threadgroup memory.
BODY = """
    threadgroup float shared_room[64];
    uint lane = thread_index_in_threadgroup;
    uint3 group = threadgroup_position_in_grid;
    uint3 groups = threadgroups_per_grid;
    uint at = ((group.z * groups.y + group.y) * groups.x + group.x) * 64 + lane;
    shared_room[lane] = twice<T>(x[at]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[at] = shared_room[min(lane + 1, 63u)] * factor + float(group.y) + float(x_shape[0]);
"""
HEADER = """
// A device function of a thread, in constant time.
template <typename T>
inline float twice(T x) { return 2.0f * float(x); }
"""
GRID = (128, 3, 2)


def small() -> Any:
    return make_kernel("small", ["x", "factor"], ["out"], BODY, HEADER)


def call(kernel: Any, grid: tuple[int, int, int] = GRID, factor: Any = None) -> mx.array:
    size = grid[0] * grid[1] * grid[2]
    (out,) = kernel(
        inputs=[mx.arange(size).astype(mx.float16), mx.array(3.0) if factor is None else factor],
        template=[("T", mx.float16)],
        grid=grid,
        threadgroup=(64, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
    )
    return out


def wanted() -> np.ndarray:
    x = np.arange(128 * 6, dtype=np.float32).reshape(2, 3, 2, 64)
    following = np.concatenate([x[..., 1:], x[..., -1:]], axis=3)
    return (6 * following + np.arange(3)[:, None, None] + x.size).reshape(-1)


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_delta.ops.building.MOST_BLOCKS", 2)


@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_what_it_gives_cuda_computes_the_same(bench: MetalBench, mode):
    with on_cuda(launch_on(bench, mode)):
        np.testing.assert_array_equal(call(small()), wanted())


def test_a_grid_that_cuda_does_not_take_becomes_a_row(bench: MetalBench, few_blocks):
    with on_cuda(launch_on(bench)):
        np.testing.assert_array_equal(call(small()), wanted())


def test_a_barrier_less_is_noticed(bench: MetalBench):
    body = BODY.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    with on_cuda(launch_on(bench, "checked")), pytest.raises(KernelFault, match="race"):
        call(make_kernel("small", ["x", "factor"], ["out"], body, HEADER))


def seen(grid: tuple[int, int, int] = GRID, factor: Any = None) -> tuple[CudaArguments, dict]:
    """What CUDA's kernel is made of, and called with."""
    found = []

    def launch(kernel: CudaArguments, text: Generated, given: dict[str, Any]) -> list[mx.array]:
        found.append((kernel, given))
        return [mx.zeros(1)]

    with on_cuda(launch):
        call(small(), grid, factor)
    return found[0]


def test_numbers_are_read_through_pointers():
    kernel, given = seen()
    assert kernel.input_names == ["x", "pointer_to_factor"] and given["grid"] == GRID
    assert "const auto factor = *pointer_to_factor;" in kernel.source
    for one in (mx.zeros(1), np.zeros(1, np.float32)):
        kernel, _ = seen(factor=one)
        assert kernel.input_names == ["x", "factor"], "an array of one number is none"
    assert seen(factor=3.0)[0].input_names == ["x", "pointer_to_factor"]


def test_a_long_grid_says_its_size_in_an_input():
    kernel, given = seen((64, 3, 1 << 16))
    assert kernel.input_names[2:] == ["metal_grid"]
    assert given["inputs"][2].tolist() == [1, 3, 1 << 16]
    assert given["grid"] == (64 * 3 << 16, 1, 1)


@pytest.mark.parametrize(
    ("grid", "threadgroup"),
    [
        ((96, 1, 1), (64, 1, 1)),
        ((64, 2, 1), (32, 2, 1)),
        ((40, 1, 1), (40, 1, 1)),
        ((2048, 1, 1), (2048, 1, 1)),
        ((64, 0, 1), (64, 1, 1)),
        ((1 << 20, 1 << 11, 1), (64, 1, 1)),
        ((0, 1, 1), (0, 1, 1)),
    ],
    ids=str,
)
def test_grids_that_it_refuses(grid, threadgroup):
    kernel = CudaKernel("k", ["x"], ["out"], BODY, HEADER)
    with pytest.raises(ValueError, match=r"^\[k\] CUDA takes threadgroups of one row"):
        kernel(inputs=[], grid=grid, threadgroup=threadgroup)


def test_metal_gets_the_source_as_it_is():
    with seems_to_have(METAL), mock.patch.object(mx.fast, "metal_kernel", dict):
        made: Any = make_kernel("k", ["x"], ["out"], BODY, HEADER, launching.SAFE_MATH).kernel
    assert (made["source"], made["header"]) == (BODY, HEADER)
    assert made["compile_options"] == {"math_mode": "safe"}


@pytest.mark.parametrize(
    ("metal", "cuda"),
    [
        ("const device T* x, thread float (&y)[2]", "const  T* x,  float (&y)[2]"),
        ("threadgroup uint words[Size * W];", "__shared__  uint words[Size * W];"),
        ("(threadgroup float*)weights", "( float*)weights"),
        ("constant constexpr int N = 8;", " constexpr int N = 8;"),
        ("inline void f(); // inline device", "METAL_INLINE void f(); // inline device"),
        ("uint i [[thread_position_in_grid]]", "uint i "),
    ],
)
def test_words(metal, cuda):
    assert translated(metal) == cuda


def test_attributes_are_declared_where_they_are_named():
    body = cuda_body("x[thread_position_in_grid.x]", [], False)
    assert body.index("threadgroup_position_in_grid = ") < body.index("thread_position_in_grid = ")
    assert "thread_index_in_simdgroup" not in body


@pytest.mark.parametrize(
    ("has", "kernels", "matrices"), [(None, False, False), (METAL, True, True), (CUDA, True, False)]
)
def test_back_ends(has, kernels, matrices):
    with seems_to_have(has):
        assert backend.backend() == has
        assert (backend.has_kernels(), backend.has_matrices()) == (kernels, matrices)
        with mock.patch.object(mx, "default_device", lambda: mx.Device(mx.cpu)):
            assert not backend.has_kernels(), "MLX was told to use the CPU"


def test_the_stream_of_a_cpu_has_no_kernels():
    assert mx.default_device() == mx.Device(mx.cpu) or mx.metal.is_available()
    with mock.patch.object(mx.cuda, "is_available", lambda: True), mx.stream(mx.cpu):
        assert backend.backend() is None


@pytest.mark.parametrize(("cores", "simdgroups"), [(132, 132 * 12), (None, 1200)])
def test_multiprocessors(monkeypatch, cores, simdgroups):
    launching._own_simdgroups.cache_clear()
    monkeypatch.setattr(launching, "gpu_cores", lambda: cores)
    with seems_to_have(CUDA):
        assert launching.gpu_simdgroups() == simdgroups
    launching._own_simdgroups.cache_clear()


class Driver:
    """NVIDIA's driver, of a GPU with so many multiprocessors."""

    def __init__(self, count: int, refuses: str = "") -> None:
        self.count, self.refuses = count, refuses

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> int:
            if name == "cuDeviceGetAttribute" and arguments[1] == 16:
                arguments[0]._obj.value = self.count
            return int(name == self.refuses)

        return answer


@pytest.mark.parametrize(
    ("driver", "cores"),
    [
        (Driver(132), 132),
        (Driver(0), None),
        *((Driver(132, name), None) for name in ("cuInit", "cuDeviceGet", "cuDeviceGetAttribute")),
    ],
)
def test_the_driver_counts_multiprocessors(monkeypatch, driver, cores):
    monkeypatch.setattr(chips.platform, "system", lambda: "Linux")
    monkeypatch.setattr(chips.ctypes, "CDLL", lambda name: driver)
    chips.gpu_cores.cache_clear()
    assert chips.gpu_cores() == cores
    chips.gpu_cores.cache_clear()


def test_the_memory_of_a_gpu_is_a_bound(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"free_memory": 5000})
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1000)
    assert memory.free_memory(0) == (6000, "the GPU's memory")


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"architecture": "sm_90", "device_name": "NVIDIA H200"}, "NVIDIA H200"),
        ({"architecture": "applegpu_g16s", "device_name": "Apple M4 Max"}, "a chip"),
        ({}, "a chip"),
    ],
)
def test_an_nvidia_gpu_has_its_own_name(monkeypatch, info, name):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(devices, "chip_name", lambda: "a chip")
    assert devices.machine_name() == name


def test_every_launcher_goes_through_the_maker():
    """With CUDA none of them asks for a kernel of Metal's."""
    with mock.patch.object(mx.fast, "metal_kernel", side_effect=AssertionError):
        assert len(every_kernel()) >= 9
