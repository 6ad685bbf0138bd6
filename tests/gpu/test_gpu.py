"""The script for a GPU: its cases, on the CPU in CUDA's words; its table; and its refusal."""

from __future__ import annotations

import json
import subprocess

import mlx.core as mx
import pytest

from mlx_delta.ops.backend import CUDA, METAL, backend

from ..cuda.execute import launch_on
from ..cuda.launches import on_cuda
from ..gpus import seems_to_have
from ..metal_cpu import MetalBench
from ..metal_cpu.fixture import bench
from . import __main__ as script
from . import table
from .cases import CASES, FEW

__all__ = ["bench"]

QUICK = FEW[:2]

needs_no_gpu = pytest.mark.skipif(backend() is not None, reason="there is a GPU, which runs it")


@needs_no_gpu
@pytest.mark.parametrize("name", CASES)
def test_cases_in_the_words_of_cuda(request: pytest.FixtureRequest, bench: MetalBench, name):
    """What MLX would compile for NVIDIA computes what the specification says."""
    if name not in QUICK and not request.config.getoption("--all"):
        pytest.skip("compiling every form takes a minute; --all does")
    with on_cuda(launch_on(bench)):
        CASES[name]()


@needs_no_gpu
def test_without_a_gpu_it_says_so(capsys):
    with seems_to_have(None):
        assert script.main([]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "mlx[cuda13]" in said.err


def wrong() -> None:
    raise AssertionError("1 is not 2")


def test_a_wrong_case_is_said_and_the_others_run(monkeypatch, capsys):
    monkeypatch.setattr(script, "CASES", {"wrong": wrong, "right": lambda: None})
    with seems_to_have(METAL):
        assert script.main(["--cases", "all"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("right") for row in rows] == [None, False, True]
    assert rows[0]["back-end"] == METAL and "1 is not 2" in rows[1]["said"]


@pytest.mark.parametrize(
    ("status", "right"), [(0, True), (3, False), (None, True)], ids=["right", "wrong", "slow"]
)
def test_nvidias_checker_runs_the_cases(monkeypatch, status, right):
    def run(command, timeout, **_):
        assert command[0] == "/bin/checker" and command[-3:] == ["tests.gpu", "--cases", "few"]
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status, "out", "err")

    monkeypatch.setattr(script.shutil, "which", lambda name: "/bin/checker")
    monkeypatch.setattr(script.subprocess, "run", run)
    with seems_to_have(CUDA):
        assert [row["right"] for row in script.checked()] == [right]
    with seems_to_have(METAL):
        assert script.checked() == []


def test_the_table_has_all_paths_and_their_spread(monkeypatch):
    monkeypatch.setattr(table, "times_of", lambda tried, path, rounds: [1e-6, 3e-6, 2e-6])
    rows = list(table.rows([128, 256]))
    assert [(row["store"], row["tokens"], row["path"]) for row in rows[:4]] == [
        *(("codes", 128, path) for path in ("dense", "kernel", "unpack")),
        ("codes", 256, "dense"),
    ]
    assert len(rows) == 2 * 2 * 3
    assert (rows[0]["us"], rows[0]["least_us"], rows[0]["most_us"]) == (2.0, 1.0, 3.0)
    assert list(table.rows([128], seconds=-1)) == []


def test_the_table_times_attention():
    with mx.stream(mx.cpu):
        (row, *_) = table.rows([64], rounds=1)
    assert row["us"] > 0
