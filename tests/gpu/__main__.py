"""Runs the kernels on this machine's GPU, Apple's or NVIDIA's: ``python -m tests.gpu``.

First every kernel's cases against their specifications; then, where NVIDIA's compute-sanitizer is
installed, a few of them once more under it; then a table of times. A line of JSON for each, at most
five minutes in all, and nothing is fetched. Ends with 1 if a case was wrong, with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from typing import Any

import mlx.core as mx

from mlx_delta.ops.backend import CUDA, backend
from mlx_delta.system.chips import gpu_cores

from .cases import CASES, FEW
from .table import rows

CHECKER = "compute-sanitizer"
CHECKER_S, ALL_S = 75.0, 270.0


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--cases", choices=["all", "few"], help="the cases only")
    asked, begun = parser.parse_args(arguments).cases, time.perf_counter()
    # A kernel that is left out is wrong, however right what operations make of it.
    warnings.filterwarnings("error", message=r"\[kernels\]")
    if backend() is None:
        print(
            "tests.gpu needs a GPU that MLX runs on: a Mac, or an NVIDIA one with "
            "`pip install 'mlx[cuda13]'`.",
            file=sys.stderr,
        )
        return 2
    say(machine())
    wrong = [row for row in map(run_case, FEW if asked == "few" else CASES) if not row["right"]]
    if asked is None:
        wrong += [row for row in checked() if not row["right"]]
        for row in rows(seconds=ALL_S - (time.perf_counter() - begun)):
            say(row)
    return int(bool(wrong))


def say(row: dict[str, Any]) -> None:
    """Print a row."""
    print(json.dumps(row), flush=True)


def machine() -> dict[str, Any]:
    """What everything ran on."""
    return {
        "kind": "machine",
        "back-end": backend(),
        "device": str(mx.device_info().get("device_name")),
        "cores": gpu_cores(),
        "mlx": importlib.metadata.version("mlx"),
    }


def run_case(name: str) -> dict[str, Any]:
    """Run a case and say how it went."""
    begun, said = time.perf_counter(), ""
    try:
        CASES[name]()
    except Exception:  # whatever it is, the other cases are worth running
        said = traceback.format_exc(limit=-3)[-1500:]
    row = {"kind": "case", "name": name, "right": not said}
    row |= {"seconds": round(time.perf_counter() - begun, 2)}
    row |= {"said": said} if said else {}
    say(row)
    return row


def checked() -> list[dict[str, Any]]:
    """Some cases once more, every access to memory followed by NVIDIA's checker if it is here."""
    program = shutil.which(CHECKER)
    if backend() != CUDA or program is None:
        return []
    command = [program, "--tool", "memcheck", "--error-exitcode", "3"]
    command += [sys.executable, "-m", "tests.gpu", "--cases", "few"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECKER_S)
        right, said = done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    except subprocess.TimeoutExpired:
        right, said = True, f"not finished in {CHECKER_S:.0f} s"
    row = {"kind": "checker", "name": CHECKER, "right": right, "said": said}
    say(row)
    return [row]


if __name__ == "__main__":
    raise SystemExit(main())
