"""A small, seeded part of ``fuzz.py``.

``MLX_DELTA_FUZZ=2500 pytest tests/convert/test_fuzz.py`` runs as many cases for each format.
"""

import json
import os
import subprocess
import sys

import pytest

from .fuzz import FORMATS

COUNT = int(os.environ.get("MLX_DELTA_FUZZ", "40"))


@pytest.mark.parametrize("name", list(FORMATS))
def test_damaged_and_hostile_checkpoints_give_a_clear_error_or_a_correct_result(name):
    done = subprocess.run(
        [sys.executable, "-m", "tests.convert.fuzz", name, str(COUNT), "1"],
        capture_output=True,
        text=True,
        timeout=60 + 5 * COUNT,
    )
    assert done.stdout, f"crashed at case {done.stderr[-300:]}"
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["error"] + found["result"] == COUNT and found["error"] > COUNT // 4
    assert found["peak"] < 400e6
