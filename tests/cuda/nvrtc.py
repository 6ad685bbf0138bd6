"""NVIDIA's compiler as a library, which MLX compiles kernels with when they are first launched.

It comes with ``mlx[cuda13]`` and with CUDA's toolkit, and needs no GPU. It is called as MLX calls
it (``mlx/backend/cuda/jit_module.cpp``): for one architecture, where CUDA's headers are, and with
functions on the device unless they say otherwise; with nothing else.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

from .generated import Generated
from .nvcc import ARCHITECTURE, STAND_INS

NVRTC_HINT = "NVRTC and CUDA's headers are not here (nvidia-cuda-nvrtc and CUDA's toolkit)"


def _folders() -> list[Path]:
    """Where packages and toolkits of CUDA lie."""
    spec = importlib.util.find_spec("nvidia")
    packages = spec.submodule_search_locations or [] if spec is not None else []
    found = [folder for place in packages for folder in Path(place).glob("*")]
    found += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    return found


@cache
def find_nvrtc() -> tuple[Path, Path] | None:
    """The library, and the folder of CUDA's headers."""
    libraries = [
        file
        for folder in _folders()
        for place in ("lib", "lib64")
        for file in sorted((folder / place).glob("libnvrtc.so.*"))
    ]
    headers = [folder / "include" for folder in _folders()]
    headers = [folder for folder in headers if (folder / "cuda_fp16.h").is_file()]
    return (libraries[0], headers[0]) if libraries and headers else None


@cache
def _load(library: Path) -> ctypes.CDLL:
    for file in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)  # it is asked for by its name alone
    return ctypes.CDLL(str(library))


def compile_as_mlx_does(generated: Generated) -> None:
    """Compile a kernel.

    Raises:
        RuntimeError: NVRTC refuses it, or is not here; its log is the message.
    """
    found = find_nvrtc()
    if found is None:
        raise RuntimeError(f"[compile_as_mlx_does] {NVRTC_HINT}.")
    nvrtc, program = _load(found[0]), ctypes.c_void_p()
    files = sorted(file for file in STAND_INS.rglob("*") if file.is_file())
    texts = (ctypes.c_char_p * len(files))(*(file.read_bytes() for file in files))
    names = (ctypes.c_char_p * len(files))(
        *(file.relative_to(STAND_INS).as_posix().encode() for file in files)
    )
    source = generated.text.encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", len(files), texts, names)
    try:
        nvrtc.nvrtcAddNameExpression(program, generated.function.encode())
        options = [b"--device-as-default-execution-space"]
        options.append(f"--gpu-architecture={ARCHITECTURE}".encode())
        options.append(f"--include-path={found[1]}".encode())
        given = (ctypes.c_char_p * len(options))(*options)
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(
                f"[compile_as_mlx_does] NVRTC refused {generated.function}:\n"
                f"{log.value.decode()[:6000]}"
            )
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
