"""A canary: what the bench assumes about the source that MLX generates."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from .bench import KernelSource
from .signature import Buffer, SignatureError, capture, parse

CALL: dict[str, Any] = {
    "grid": (64, 1, 1),
    "threadgroup": (32, 1, 1),
    "output_shapes": [(64,), (3,)],
    "output_dtypes": [mx.float32, mx.bfloat16],
}


def test_plain_kernel_is_generated_as_expected() -> None:
    kernel = KernelSource(
        "canary",
        ["x", "few", "number"],
        ["out", "other"],
        "uint i = thread_position_in_grid.x;\nout[i] = x[i] + few[0] + number;",
        header="inline float twice(float x) { return 2 * x; }\n",
    )
    inputs = [mx.zeros((64,), mx.bfloat16), mx.zeros((3,), mx.int32), 2.5]
    text = capture(kernel.build(), inputs, **CALL)
    assert text == (
        "inline float twice(float x) { return 2 * x; }\n"
        "[[kernel]] void custom_kernel_canary_bfloat16_t_int32_tc_floats_float_bfloat16_t(\n"
        "  const device bfloat16_t* x [[buffer(0)]],\n"
        "  const constant int32_t* few [[buffer(1)]],\n"
        "  const constant float& number [[buffer(2)]],\n"
        "  device float* out [[buffer(3)]],\n"
        "  device bfloat16_t* other [[buffer(4)]],\n"
        "  uint3 thread_position_in_grid [[thread_position_in_grid]]) {\n"
        "uint i = thread_position_in_grid.x;\n"
        "out[i] = x[i] + few[0] + number;\n"
        "}\n"
    )


def test_template_kernel_is_read() -> None:
    body = """uint i = thread_position_in_grid.x + simdgroup_index_in_threadgroup;
        out[i] = x[i] * N + x_shape[0] + x_strides[0] + x_ndim;"""
    kernel = KernelSource("canary", ["x"], ["out", "other"], body).build()
    template = [("T", mx.float16), ("N", -3), ("Flag", True)]
    text = capture(kernel, [mx.zeros((8, 8))], template=template, **CALL)
    generated = parse(text)
    assert "template <typename T, int N, bool Flag>" in generated.source
    assert generated.function.endswith("<float16_t, -3, 1>")
    assert "decltype" in generated.text and "decltype" not in generated.source
    assert [b.name for b in generated.buffers] == [
        "x", "x_shape", "x_strides", "x_ndim", "out", "other",
    ]  # fmt: skip
    assert generated.buffers[0] == Buffer("x", "float", "device", True, False)
    assert generated.buffers[2] == Buffer("x_strides", "int64_t", "constant", True, False)
    assert generated.buffers[3] == Buffer("x_ndim", "int", "constant", True, True)
    assert generated.buffers[5] == Buffer("other", "bfloat16_t", "device", False, False)
    assert set(generated.attributes) == {
        "thread_position_in_grid",
        "simdgroup_index_in_threadgroup",
    }


def test_atomic_outputs_are_read() -> None:
    kernel = KernelSource("canary", ["x"], ["out", "other"], "", atomic_outputs=True).build()
    generated = parse(capture(kernel, [mx.zeros((64,))], **CALL))
    assert generated.buffers[1] == Buffer("out", "atomic<float>", "device", False, False)


def test_functions_in_the_header_are_not_taken_for_the_kernel() -> None:
    header = "[[kernel]] void other(\n  device float* p [[buffer(0)]]) {\n}\n"
    kernel = KernelSource("canary", ["x"], ["out", "other"], "", header=header).build()
    generated = parse(capture(kernel, [mx.zeros((64,))], **CALL))
    assert [b.name for b in generated.buffers] == ["x", "out", "other"]


def test_unknown_source_is_an_error() -> None:
    with pytest.raises(SignatureError, match="no kernel function"):
        parse("kernel void f() {}")
