"""Hostile model directories: each is refused in one line or runs, and no process dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.hostile import cases, damage
from tests.tiny import write_llama

CASES = cases()
KINDS = ("ValueError", "FileNotFoundError", "MemoryError")
BATCHES = 2


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each case, by number; a case that ended its process is missing."""
    folder = tmp_path_factory.mktemp("hostile")
    whole = write_llama(folder / "whole", hidden_size=32, num_hidden_layers=3)
    files = {file.name: file.read_bytes() for file in whole.iterdir()}
    for number, (_, kind, change) in enumerate(CASES):
        path = folder / str(number)
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        damage(path, kind, change)
    size = -(-len(CASES) // BATCHES)
    batches = [(i, min(i + size, len(CASES))) for i in range(0, len(CASES), size)]
    command = [sys.executable, "-m", "tests.checkpoint.hostile", str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(first), str(last)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first, last in batches
    ]
    found = {}
    for process in processes:
        out, err = process.communicate(timeout=300)
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"case"')]
        found |= {line["case"]: line for line in lines}
        assert process.returncode == 0, f"died after {lines[-1:]}: {err[-500:]}"
    return found


def test_there_are_more_than_200_cases():
    assert len(CASES) > 200


@pytest.mark.parametrize("number", range(len(CASES)), ids=[name for name, *_ in CASES])
def test_a_hostile_model_is_refused_in_one_line_or_runs(outcomes, number):
    found = outcomes[number]
    if found["error"] is not None:
        assert found["error"] in KINDS, found
        assert found["text"].startswith("["), found
        assert "\n" not in found["text"] and len(found["text"]) < 1500, found


def test_most_are_refused(outcomes):
    refused = sum(found["error"] is not None for found in outcomes.values())
    assert refused > 0.9 * len(CASES)
