"""Planted mistakes: each must be reported, as what it is and at the line where it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from .bench import KernelSource, MetalBench
from .errors import KernelError, KernelFault, KernelRejected

INDICES = """uint i = thread_position_in_grid.x;
uint t = thread_position_in_threadgroup.x;
uint lane = thread_index_in_simdgroup;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mistake:
    """A kernel body with a mistake, and what the bench must say."""

    name: str
    body: str
    report: str
    mode: str = "checked"
    options: dict[str, Any] = field(default_factory=dict)
    threadgroup: int = 64
    error: type[KernelError] = KernelFault


def run(bench: MetalBench, body: str, threadgroup: int = 64, **options: Any) -> list[mx.array]:
    kernel = KernelSource("planted", ["x"], ["out"], INDICES + body)
    options = {"output_shapes": [(64,)], "output_dtypes": [mx.float32], **options}
    inputs = [mx.arange(64).astype(mx.float32)]
    group = (threadgroup, 1, 1)
    return bench.run(kernel, inputs=inputs, grid=(64, 1, 1), threadgroup=group, **options)


RACES = [
    Mistake(
        "missing-barrier",
        "threadgroup float b[64]; b[t] = x[i];\nout[i] = b[63 - t];",
        "data race: read of 'b' .* against thread|uninitialised",
    ),
    Mistake(
        "missing-barrier-other-schedule",
        "threadgroup float b[64]; b[t] = x[i];\nout[i] = b[63 - t];",
        "data race",
        options={"seed": 2},
    ),
    Mistake(
        "missing-barrier-before-reuse",
        f"""threadgroup float b[64]; float sum = 0;
        for (int j = 0; j < 3; j++) {{ b[t] = x[i] + j; {BARRIER} sum += b[63 - t]; }}
        out[i] = sum;""",
        "data race: write to 'b'",
    ),
    Mistake(
        "barrier-for-other-memory",
        """threadgroup float b[64]; b[t] = x[i];
        threadgroup_barrier(mem_flags::mem_device); out[i] = b[63 - t];""",
        "data race",
    ),
    Mistake(
        "simdgroup-barrier-across-simdgroups",
        """threadgroup float b[64]; b[t] = x[i];
        simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = b[63 - t];""",
        "data race|uninitialised",
    ),
    Mistake(
        "lanes-without-simdgroup-barrier",
        "threadgroup float b[64]; b[t] = x[i]; out[i] = b[t ^ 1];",
        "data race|uninitialised",
    ),
    Mistake(
        "same-value-written-by-all",
        f"threadgroup float b[1]; b[0] = 1; {BARRIER} out[i] = b[0];",
        "data race: write to 'b'",
    ),
    Mistake(
        "across-threadgroups",
        "out[t] = x[i];",
        "data race: write to 'out' .* of another threadgroup",
        threadgroup=32,
    ),
    Mistake(
        "plain-read-of-an-atomic",
        """threadgroup atomic_uint n;
        if (t == 0) atomic_store_explicit(&n, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);
        out[i] = *(threadgroup uint*)&n;""",
        "data race: .*'n'",
    ),
]
MEMORY = [
    Mistake("read-past-end", "out[i] = x[i + 1];", "out-of-bounds .*'x' at byte 256", "fast"),
    Mistake(
        "read-before-start",
        "out[i] = x[int(i) - 1];",
        "out-of-bounds .*'x' at byte -4",
        "fast",
        {"placement": "start"},
    ),
    Mistake("write-past-end", "out[i + 1] = x[i];", "out-of-bounds .*'out' at byte 256", "fast"),
    Mistake(
        "write-past-end-before-the-guard-page",
        "out[i + 3] = x[i];",
        "byte 244 of 'out' was written",
        "fast",
        {"output_shapes": [(61,)], "allow_unwritten": True},
    ),
    Mistake(
        "write-before-start",
        "out[int(i) - 1] = x[i];",
        "byte -1 of 'out' was written",
        "fast",
        {"allow_unwritten": True},
    ),
    Mistake(
        "write-past-end-exactly",
        "out[i] = x[i];",
        "out-of-bounds access: write to 'out' bytes 244 to 248",
        options={"output_shapes": [(61,)]},
    ),
    Mistake("read-far-away", "out[i] = x[i * 10000000];", "out-of-bounds .*'x'"),
    Mistake(
        "read-past-end-unaligned",
        "out[i] = x[i + 1];",
        "out-of-bounds",
        options={"placement": "unaligned"},
    ),
    Mistake(
        "misaligned-vector",
        "out[i] = ((const device float4*)x)[i / 4][i % 4];",
        "trap: .*misaligned vector.*at line",
        "fast",
        {"placement": "unaligned"},
    ),
    Mistake(
        "write-to-const",
        "device float* p = (device float*)x; p[i] = 1; out[i] = 0;",
        "write to a const buffer: .*'x'",
    ),
    Mistake(
        "write-to-const-fast",
        "device float* p = (device float*)x; p[i] = 1; out[i] = 0;",
        "write to a const buffer",
        "fast",
    ),
    Mistake(
        "threadgroup-array-index",
        f"threadgroup float b[32]; b[t] = x[i]; {BARRIER} out[i] = b[t & 31];",
        "trap: array index",
        "fast",
    ),
    Mistake(
        "threadgroup-pointer",
        f"""threadgroup float b[32]; threadgroup float* p = b; p[t] = x[i];
        {BARRIER} out[i] = p[t & 31];""",
        "out-of-bounds access.*'b'",
    ),
    Mistake(
        "threadgroup-pointer-fast",
        f"""threadgroup float b[32]; threadgroup float* p = b; p[t] = x[i];
        {BARRIER} out[i] = p[t & 31];""",
        "guard page.*'b' at byte 128",
        "fast",
    ),
    Mistake(
        "thread-array-index",
        "float v[4]; for (int j = 0; j < 5 + int(x[0]); j++) v[j] = x[i]; out[i] = v[int(x[2])];",
        "trap: array index",
        "fast",
    ),
    Mistake("vector-index", "float4 v(x[i]); out[i] = v[int(x[4])];", "vector index out of range"),
    Mistake(
        "threadgroup-memory-not-written",
        f"threadgroup float b[64]; if (t < 10) b[t] = x[i]; {BARRIER} out[i] = b[t];",
        "uninitialised memory: read of 'b' bytes 40 to 44",
    ),
    Mistake(
        "threadgroup-memory-of-the-last-threadgroup",
        f"""threadgroup float b[32]; if (threadgroup_position_in_grid.x == 0) b[t] = x[i];
        {BARRIER} out[i] = b[t];""",
        "uninitialised memory: read of 'b'",
        threadgroup=32,
    ),
    Mistake("output-read-first", "out[i] += x[i];", "uninitialised memory: read of 'out'"),
    Mistake(
        "output-not-written",
        "if (i < 60) out[i] = x[i];",
        "output not written: 16 bytes of 'out' from byte 240",
    ),
    Mistake(
        "too-much-threadgroup-memory",
        f"threadgroup float b[8200]; b[t] = x[i]; {BARRIER} out[i] = b[t];",
        "too much threadgroup memory: 32800 bytes",
        "fast",
    ),
    Mistake(
        "endless-loop", "while (x[i] >= 0) {} out[i] = 0;", "timeout", "fast", {"timeout_s": 0.1}
    ),
]
THREADS = [
    Mistake(
        "exit-before-barrier",
        f"if (t >= 32) return; {BARRIER} out[i] = x[i];",
        "exited while others wait",
        "fast",
    ),
    Mistake(
        "barrier-in-one-simdgroup",
        f"if (simdgroup_index_in_threadgroup == 0) {BARRIER} out[i] = x[i];",
        "exited while others wait",
        "fast",
    ),
    Mistake(
        "different-barriers",
        f"if (t < 32) {BARRIER} else\n {BARRIER} out[i] = x[i];",
        "different barriers",
        "fast",
    ),
    Mistake(
        "simd-function-in-a-branch",
        "float v = x[i]; if (lane < 16) v = simd_sum(v);\n v = simd_max(v); out[i] = v;",
        "only some lanes: lanes 0000ffff of ffffffff",
        "fast",
    ),
    Mistake(
        "simdgroup-barrier-in-a-branch",
        "if (lane < 16) simdgroup_barrier(mem_flags::mem_none); out[i] = simd_sum(x[i]);",
        "only some lanes",
        "fast",
    ),
    Mistake(
        "shuffle-from-an-inactive-lane",
        "float v = x[i]; if (lane < 16) v = simd_shuffle_xor(v, 16); out[i] = v;",
        "inactive lane: lane 16",
        "fast",
        {"divergent_simd": True},
    ),
]
REJECTED = [
    Mistake("undeclared", "out[i] = no_such_function(x[i]);", "undeclared|not declared"),
    Mistake("double", "double d = x[i]; out[i] = d;", "metal_has_no_double_type"),
    Mistake("ambiguous-overload", "out[i] = max(x[i], 0);", "ambiguous"),
    Mistake("over-1024-threads", "out[i] = x[i];", "more than 1024", threadgroup=1025),
]


def case_id(mistake: Mistake) -> str:
    return mistake.name


@pytest.mark.parametrize("mistake", RACES + MEMORY + THREADS, ids=case_id)
def test_mistake_is_reported(bench: MetalBench, mistake: Mistake) -> None:
    loose = MetalBench(bench.compiler, strict=False)  # some are what the strict pass is for
    with pytest.raises(mistake.error, match=mistake.report):
        run(loose, mistake.body, mistake.threadgroup, mode=mistake.mode, **mistake.options)


@pytest.mark.parametrize("mistake", REJECTED, ids=case_id)
def test_source_is_rejected_without_the_strict_pass(bench: MetalBench, mistake: Mistake) -> None:
    loose = MetalBench(bench.compiler, strict=False)
    with pytest.raises(KernelRejected, match=mistake.report):
        run(loose, mistake.body, mistake.threadgroup)


def test_report_quotes_both_lines_of_a_race(bench: MetalBench) -> None:
    body = "threadgroup float b[64];\nb[t] = x[i];\nout[i] = b[63 - t];"
    with pytest.raises(KernelFault) as caught:
        run(bench, body, mode="checked", seed=1)
    race = next(d for d in caught.value.diagnoses if d.startswith("data race"))
    assert "b[t] = x[i];" in race and "out[i] = b[63 - t];" in race


def test_fault_leaves_the_bench_usable(bench: MetalBench) -> None:
    with pytest.raises(KernelFault):
        run(bench, "out[i] = x[i + 1];")
    with pytest.raises(KernelFault):
        run(bench, f"if (t >= 32) return; {BARRIER} out[i] = x[i];")
    assert run(bench, "out[i] = x[i];", mode="checked")[0].tolist() == list(range(64))
