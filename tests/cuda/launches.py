"""What MLX makes for CUDA of each kernel, from its launcher, without running anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import mlx.core as mx

from mlx_delta.ops import (
    codes_encode,
    codes_kernel,
    deltas_encode,
    deltas_kernel,
    hold_kernel,
    values_encode,
)
from mlx_delta.ops.backend import CUDA
from mlx_delta.ops.codes import CodedBlocks, Coding
from mlx_delta.ops.deltas import DeltaBlocks, LaneCoding
from mlx_delta.ops.far_values import CodedValues
from mlx_delta.ops.ternary_matvec import matvec_kernel, ternary_matvec

from ..gpus import seems_to_have
from ..kernels import tile_case as tiles
from ..kernels.code_case import coded
from ..kernels.common import BUILDERS, config
from ..kernels.delta_case import lanes
from .generated import CudaArguments, Generated, Launch, fake_cuda_kernel


@contextlib.contextmanager
def captured(**template: Any) -> Iterator[dict[str, Generated]]:
    """Launchers leave here, under a kernel's name, the last text of it; outputs are zeros.

    Args:
        **template: Template arguments that are to be others than a launcher's.
    """
    found: dict[str, Generated] = {}

    def launch(kernel: CudaArguments, text: Generated, call: dict[str, Any]) -> list[mx.array]:
        if template:
            given = [(name, template.get(name, value)) for name, value in call["template"]]
            text = kernel.generate(call["inputs"], call["output_dtypes"], given)
        found[kernel.name] = text
        pairs = zip(call["output_shapes"], call["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in pairs]

    with on_cuda(launch):
        yield found


@contextlib.contextmanager
def on_cuda(launch: Launch) -> Iterator[None]:
    """MLX looks as it does on CUDA, and launches come here."""
    forget()
    try:
        with (
            seems_to_have(CUDA),
            mock.patch.object(mx.fast, "cuda_kernel", fake_cuda_kernel(launch)),
        ):
            yield
    finally:
        forget()


def every_kernel() -> dict[str, Generated]:
    """A text of each kernel of this project."""
    half = mx.float16
    keys = mx.zeros((1, 2, 128, 64), half)
    coding = Coding.of(coded(({3: 1, 4: 1, 5: 5}, {4: 8}), (4, 2)), 2, 64)
    coded_blocks = CodedBlocks(
        words=mx.zeros((1, 2, coding.all_rows, 64), mx.uint32),
        grid=mx.zeros((1, 2, 2, 2, 64), half),
        sinks=mx.zeros((1, 2, 4, 64), half),
        coding=coding,
        head_dim=64,
    )
    scales = mx.zeros((1, 1, 128, 2), mx.uint8)
    values = CodedValues(mx.zeros((1, 1, 128, 12), mx.uint32), scales, keys, keys[:, :, :4], (4, 2))
    held = DeltaBlocks(
        payload=mx.zeros((1, 1000), mx.uint32),
        offsets=mx.zeros((1, 2, 2), mx.int32),
        low=mx.zeros((1, 2, 2, 64), half),
        steps=mx.zeros((1, 2, 2, 64), mx.uint8),
        sequence=mx.zeros((1, 2, 2, 64), mx.uint8),
        sinks=mx.zeros((1, 2, 4, 64), half),
        coding=LaneCoding.of(lanes(values=(4, 2)), 2, 64),
        size=64,
    )
    with captured() as found:
        hold_kernel.hold(keys, config(), 0)
        queries = mx.zeros((1, 4, 1, 64), half)
        rows = [(190, 1, 64, 64)]
        codes_kernel.decode(queries, rows, coded_blocks, keys, values, None, 1.0, 1)
        deltas_kernel.decode(queries, rows, held, keys, values, None, 1.0, 1)
        codes_encode.encode(keys, coding, 64, mx.ones((2, 2, 64)))
        values_encode.encode(keys, (4, 3))
        deltas_encode.encode(
            keys, lanes(values=(4, 2)), held.coding, 0
        )  # token_sequence and delta_runs too
        tiles.SMALL.attend(tiles.SMALL.choose(0.7))
        ternary_matvec(mx.zeros((1, 64), half), mx.zeros((4, 4), mx.uint32), mx.ones((4, 1)), True)
    return found


def forget() -> None:
    """Let launchers build their kernels anew."""
    for name, module in BUILDERS.items():
        getattr(module, name).cache_clear()
    matvec_kernel.cache_clear()
