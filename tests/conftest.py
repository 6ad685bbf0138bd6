"""Imports mlx_delta before any test imports MLX, so that the tests too run on a fast BLAS.

Some tests are one check of many like things. A run takes some of them, spread over all, and
``--all`` takes all.
"""

from __future__ import annotations

from collections import Counter

import pytest

import mlx_delta  # noqa: F401

# Of tests with a parameter of this name, every so many-th one.
SAMPLED = {"mutation": 6}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag."""
    parser.addoption("--all", action="store_true", help="all planted mistakes in kernels")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the sample."""
    if config.getoption("--all"):
        return
    seen: Counter[tuple[str, str]] = Counter()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        name = next((x for x in SAMPLED if x in getattr(item, "fixturenames", ())), None)
        # Asked for by its own name, a test runs.
        if name is None or any("[" in argument for argument in config.args):
            kept.append(item)
            continue
        seen[name, test] += 1
        (kept if seen[name, test] % SAMPLED[name] == 1 else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
