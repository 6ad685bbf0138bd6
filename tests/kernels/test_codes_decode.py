"""codes_decode: attention straight from coded keys and turned values, against the specification."""

from __future__ import annotations

import mlx.core as mx
import pytest

from ..metal_cpu import MetalBench
from .code_case import CodedCase, check, coded
from .common import each_type, every_run, fast_runs

MIXED = ((8, 6), (6, 6), (4, 24), (3, 12), (2, 16))


@every_run
def test_one_query(bench: MetalBench, options):
    check(bench, CodedCase(coded(), (300,)), **options)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 192, 193, 1000])
def test_lengths(bench: MetalBench, length):
    check(bench, CodedCase(coded(), (length,)))
