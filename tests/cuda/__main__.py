"""Compiles every kernel as CUDA, and counts what decode kernels take: ``python -m tests.cuda``.

First how each kernel compiles for a Hopper GPU, with nvcc and, where it is installed, with NVRTC,
which MLX itself compiles with. Then instructions for a token and kv head, counted from the code;
nothing runs. Far blocks of 64 tokens, D = 128, four queries to a kv head, float16, values of codes,
no mask.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_delta.ops import codes_kernel, deltas_kernel
from mlx_delta.ops.codes import CodedBlocks, Coding
from mlx_delta.ops.deltas import DeltaBlocks, LaneCoding
from mlx_delta.ops.far_values import CodedValues

from ..kernels.code_case import Kinds, coded
from ..kernels.delta_case import lanes
from .count import Trips, Walk, count
from .generated import Generated
from .launches import captured, every_kernel
from .nvcc import compile_cuda
from .nvrtc import compile_as_mlx_does, find_nvrtc

D, QUERIES, TOKENS = 128, 4, 64
OVER_BLOCKS = "base < end; base += Ahead"
HALF = mx.float16
PER_TOKEN = D * QUERIES / 32  # multiply-adds of a lane, for keys or for values
ROWS: tuple[tuple[Kinds, int], ...] = (
    ({4: 16}, 4),
    ({2: 2, 3: 4, 4: 5, 5: 4, 8: 1}, 4),
    ({4: 4, 5: 6, 6: 3}, 3),
    ({5: 4, 6: 6, 8: 1}, 2),
)


def _near_and_values(heads: int, width: int) -> tuple[mx.array, CodedValues]:
    near = mx.zeros((1, heads, 128, D), HALF)
    scales = mx.zeros((1, 1, 256, heads * D // 64), mx.uint8)
    words = mx.zeros((1, 1, 256, heads * D * width // 32), mx.uint32)
    values = CodedValues(words, scales, near, near[:, :, :4], (width,) * heads)
    return near, values


def codes_decode(kinds: Kinds, width: int, by_bytes: bool) -> tuple[str, Walk]:
    """The kernel as CUDA for keys of such rows and values of one width, and its walk."""
    heads = 2
    coding = Coding.of(coded(kinds, (width,) * heads), heads, D)
    blocks = CodedBlocks(
        words=mx.zeros((1, 4, coding.all_rows, TOKENS), mx.uint32),
        grid=mx.zeros((1, heads, 4, 2, D), HALF),
        sinks=mx.zeros((1, heads, 4, D), HALF),
        coding=coding,
        head_dim=D,
    )
    near, values = _near_and_values(heads, width)
    queries = mx.zeros((1, heads * QUERIES, 1, D), HALF)
    with captured(Bytes=by_bytes) as found:
        rows = [(320, 4, 256, 256)]
        codes_kernel.decode(queries, rows, blocks, near, values, None, 1.0, 1)
    trips = []
    for kind, rows in kinds.items():
        # Rows come in pairs, of which half of the lanes each has one, for four tokens.
        total = (rows + 1) // 2 * 4 * 2 * kind * QUERIES
        trips.append(Trips(f"add_kind<{kind},", "FFMA", total))
    trips.append(Trips(f"add_if_coded<{width},", "FFMA", TOKENS * PER_TOKEN))
    cold = ("exact_scores<", "add_exact<", "raise(state", "hide<")
    return found["codes_decode"].text, Walk(TOKENS, OVER_BLOCKS, trips, cold)


# Bits of lanes, and of values.
LANE_ROWS: tuple[tuple[tuple[int, ...], int], ...] = (((4,) * 16, 4), ((6, 5, 4, 3) * 4, 4))


def deltas_decode(widths: tuple[int, ...], width: int) -> tuple[str, Walk]:
    """The kernel for keys held by lanes of these widths, values of one width, and its walk."""
    heads, blocks = 2, 4
    setting = lanes(widths, (width,) * heads)
    far = DeltaBlocks(
        payload=mx.zeros((1, 8192), mx.uint32),
        offsets=mx.zeros((1, heads, blocks), mx.int32),
        low=mx.zeros((1, heads, blocks, D), HALF),
        steps=mx.zeros((1, heads, blocks, D), mx.uint8),
        sequence=mx.zeros((1, heads, blocks, TOKENS), mx.uint8),
        sinks=mx.zeros((1, heads, 4, D), HALF),
        coding=LaneCoding.of(setting, heads, D),
        size=TOKENS,
    )
    near, values = _near_and_values(heads, width)
    queries = mx.zeros((1, heads * QUERIES, 1, D), HALF)
    with captured(Bytes=True) as found:
        rows = [(320, blocks, 256, 256)]
        deltas_kernel.decode(queries, rows, far, near, values, None, 1.0, 1)
    ahead = 32 * 8 // D
    trips = [
        Trips("chunk < CODED_TOKENS", "", TOKENS / 16),
        Trips("strip < DELTA_CHUNK", "", 2),
        Trips("first < DELTA_STRIP", "FFMA", 8 * 8 * QUERIES),
        Trips("ahead < Ahead", "", ahead),
        Trips(f"add_if_coded<{width},", "FFMA", TOKENS * PER_TOKEN),
    ]
    cold = ("exact_scores<", "add_exact<", "raise(state", "hide<")
    source = found["deltas_decode"].text
    return source, Walk(TOKENS * ahead, OVER_BLOCKS, trips, cold)


def row(name: str, source: str, walk: Walk) -> str:
    """A line of the table."""
    compiled = compile_cuda(source, read_back=True)
    kinds = count(compiled.disassembly, source, walk)
    shown = ("all", "multiply-add", "other float", "threadgroup", "device", "shuffle", "special")
    numbers = " | ".join(f"{kinds[kind]:.1f}" for kind in (*shown, "other"))
    return f"| {name} | {numbers} | {compiled.registers} |"


def compiled(generated: Generated) -> str:
    """How a kernel compiles: registers of a thread, and bytes of them that are kept in memory."""
    found = compile_cuda(generated.text)
    if find_nvrtc() is None:
        return f"| {found.registers} | {found.spilled} | not here |"
    compile_as_mlx_does(generated)
    return f"| {found.registers} | {found.spilled} | compiles |"


def main() -> None:
    """Print the tables."""
    print("| kernel | registers | spilled | NVRTC |\n" + "|---" * 4 + "|")
    for name, generated in every_kernel().items():
        print(f"| `{name}` {compiled(generated)}", flush=True)
    print()
    print(
        "| kernel | instructions | multiply-adds | other float | threadgroup memory "
        "| device memory | shuffles | special | integer and rest | registers |\n"
        + "|---" * 10
        + "|"
    )
    for kinds, width in ROWS:
        keys = ", ".join(f"{rows} x {kind}" for kind, rows in kinds.items())
        name = f"`codes_decode`, keys' rows {keys}; values {width} bits"
        print(row(name, *codes_decode(kinds, width, True)), flush=True)
    for lane_widths, width in LANE_ROWS:
        keys = ", ".join(map(str, sorted(set(lane_widths), reverse=True)))
        name = f"`deltas_decode`, lanes of {keys} bits; values {width} bits"
        print(row(name, *deltas_decode(lane_widths, width)), flush=True)


if __name__ == "__main__":
    main()
