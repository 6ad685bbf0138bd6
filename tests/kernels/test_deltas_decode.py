"""deltas_decode: attention straight from held keys by lanes, against the specification."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..metal_cpu import MetalBench
from .common import every_run
from .delta_case import DeltaCase, check, lanes

FOUR = lanes()


def one(length: int, **changes: Any) -> DeltaCase:
    """A case with four queries to a simdgroup, all of which take the same compiled kernel."""
    default = {"setting": FOUR, "heads": (8, 2), "dtype": mx.float16}
    return DeltaCase(lengths=(length,), **{**default, **changes})


@every_run
def test_one_query(bench: MetalBench, options):
    check(bench, one(300), **options)
