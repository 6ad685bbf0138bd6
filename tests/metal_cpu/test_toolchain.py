"""The compiler, and the cache of what it made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_delta.ops.metal_text import RewriteError, tokens

from . import toolchain
from .bench import KernelSource, MetalBench
from .errors import FAULTS, KernelRejected
from .rewrite import rewrite

CALL: dict[str, Any] = {
    "inputs": [],
    "grid": (4, 1, 1),
    "threadgroup": (4, 1, 1),
    "output_shapes": [(4,)],
    "output_dtypes": [mx.float32],
}
KERNEL = KernelSource("cache", [], ["out"], "out[thread_position_in_grid.x] = 1;")


@pytest.fixture
def empty_cache(tmp_path: Path, bench: MetalBench, monkeypatch: pytest.MonkeyPatch) -> Path:
    runtime = toolchain.build_runtime(bench.compiler)  # one runtime a process
    monkeypatch.setattr(toolchain, "build_runtime", lambda compiler: runtime)
    monkeypatch.setenv(toolchain.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def test_compiles_each_kernel_once(bench: MetalBench, empty_cache: Path) -> None:
    bench.run(KERNEL, **CALL)
    first = {path: path.stat().st_mtime_ns for path in empty_cache.glob("*.so")}
    assert len(first) == 1
    bench.run(KERNEL, **CALL)
    assert {path: path.stat().st_mtime_ns for path in empty_cache.glob("*.so")} == first
    bench.run(KERNEL, **CALL, mode="checked")
    assert len(list(empty_cache.glob("*.so"))) == 2


def test_reads_headers_once_for_all_kernels(bench: MetalBench, empty_cache: Path) -> None:
    for value in ("1;", "2;"):
        bench.run(KERNEL.edited(lambda source, new=value: source.replace("1;", new)), **CALL)
    assert len(list(empty_cache.glob("*.pch"))) == (0 if bench.compiler.is_gcc else 1)


def test_failed_compilation_leaves_no_library(bench: MetalBench, empty_cache: Path) -> None:
    with pytest.raises(KernelRejected):
        bench.run(KERNEL.edited(lambda source: source.replace("1;", "nothing;")), **CALL)
    assert not list(empty_cache.glob("*.so"))


def test_cache_is_keyed_by_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.cached(["a", "b"], ".so") == toolchain.cached(["a", "b"], ".so")
    assert toolchain.cached(["a", "b"], ".so") != toolchain.cached(["a", "c"], ".so")
    before = toolchain.cached(["a"], ".so")
    monkeypatch.setattr(toolchain, "bench_version", lambda: "another")
    assert toolchain.cached(["a"], ".so") != before


def test_no_compiler_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    with pytest.raises(toolchain.CompileError, match="pip install ziglang"):
        MetalBench()


def test_named_compiler_must_be_there() -> None:
    script = f"from {toolchain.__name__} import find_compiler; find_compiler()"
    environment = {**os.environ, toolchain.COMPILER_VARIABLE: "no-such-compiler"}
    root = Path(__file__).parents[len(toolchain.__name__.split(".")) - 1]
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert "METAL_CPU_CXX=no-such-compiler, but it is missing or too old" in process.stderr


def test_faults_have_names() -> None:
    text = (toolchain.RUNTIME / "abi.h").read_text()
    enumerators = text[text.index("enum FaultKind {") :].split("}")[0].split("{")[1].split(",")
    assert len([name for name in enumerators if name.strip()]) == len(FAULTS)


REWRITTEN = {
    "threadgroup float b[64];": "using b_type = threadgroup float[64];",
    "threadgroup T a[N], b[2][f(1, 2)];": "using b_type = threadgroup T[2][f(1, 2)];",
    "threadgroup metal::vec<T, 4> v[8];": "using v_type = threadgroup metal::vec<T, 4>[8];",
    "threadgroup atomic_uint n;": "using n_type = threadgroup atomic_uint;",
    "threadgroup float b[64 /* a */]; // c": "using b_type = threadgroup float[64  ];",
}
UNCHANGED = [
    "threadgroup float* p = b;",
    "threadgroup const float4* p;",
    "void f(threadgroup float* p, threadgroup T b[32]) {}",
    "auto p = reinterpret_cast<threadgroup float4*>(b);",
    "// threadgroup float b[64];",
    "/* threadgroup float b[64]; */",
    "threadgroup float& r = b[0];",
    "#define POINTER threadgroup float*",
]


@pytest.mark.parametrize("source", REWRITTEN)
def test_rewrites_threadgroup_variables(source: str) -> None:
    assert REWRITTEN[source] in rewrite(source)


@pytest.mark.parametrize("source", UNCHANGED)
def test_leaves_the_rest(source: str) -> None:
    assert rewrite(source) == source


def test_hints_to_unroll_are_left_out() -> None:
    hint = '_Pragma("clang loop unroll(full)")'
    assert rewrite(f"{hint}\nfor (;;) {{}}\n#define U {hint}") == "\nfor (;;) {}\n#define U "


def test_rewriting_keeps_line_numbers() -> None:
    source = "a;\nthreadgroup float b[64]\n  [2];\nc;\n"
    assert rewrite(source).split("\n").index("c;") == 3


def test_variable_in_a_macro_is_an_error() -> None:
    with pytest.raises(RewriteError, match="declared in a macro"):
        rewrite("#define SHARED threadgroup float b[64]\n")


def test_tokens_give_the_source_back() -> None:
    source = 'a "b;\\"c" // d\n /* e\n*/ #f\n  #g \\\n h\ni::j<k>()[0]; \'l\''
    assert "".join(tokens(source)) == source
