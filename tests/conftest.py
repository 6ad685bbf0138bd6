"""Imports mlx_delta before any test imports MLX, so that the tests too run on a fast BLAS.

No table that was measured on this machine counts: what tests see is what every machine does.

A run takes some of the mistakes that are planted in kernels, spread over all; ``--all`` takes all.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

import mlx_delta  # noqa: F401

os.environ["MLX_DELTA_TUNING"] = "off"

# Of the mistakes planted for one test, every so many-th one.
MISTAKES = 9


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag."""
    parser.addoption("--all", action="store_true", help="all planted mistakes in kernels")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the sample."""
    # Asked for by its own name, a test runs.
    if config.getoption("--all") or any("[" in argument for argument in config.args):
        return
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        planted = "mutation" in getattr(item, "fixturenames", ())
        (left_out if planted and seen[test] % MISTAKES else kept).append(item)
        seen[test] += planted
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture
def tiles_from_the_start(monkeypatch):
    """Tiles are chosen in short texts too."""
    for module in ("attention.prefill", "calibrate.tiles"):
        monkeypatch.setattr(f"mlx_delta.{module}.EXACT_BEGIN", 0)
