"""A text, and the kinds of settings that each cache is tried with."""

from __future__ import annotations

import dataclasses

import pytest

from mlx_delta import DeltaConfig
from tests.attention.test_hybrid import inputs
from tests.tiny import SMALL

LENGTH = 150
TEXT = inputs(LENGTH, dim=32)  # of which values can be codes
CHAIN = DeltaConfig(block_size=8, window=8, keyframes=False, run_value="first")
HALVES = dataclasses.replace(SMALL, value_bits=16)
# Of each kind of code, with widths as calibrated ones, and rotated ones for want of any.
CODES = dataclasses.replace(
    SMALL,
    key_format="codes",
    key_bits=4,
    value_bits=4,
    key_widths=(("8365243332583333" * 2, "2424424224422442" * 2),),
    value_widths=((3, 6),),
)
# Lanes of 6, 4, 3 and 2 bits, of 5, 5, 3 and 2 in the other head.
LANES = dataclasses.replace(
    CODES,
    threshold=None,
    threshold_mode="optimal",
    level=0.02,
    key_format="deltas",
    key_widths=(("6432" * 4 * 2, "5532" * 4 * 2),),
)
ROTATED = dataclasses.replace(CODES, key_widths=None, value_widths=None)
each_setting = pytest.mark.parametrize(
    "config",
    [SMALL, CHAIN, HALVES, CODES, ROTATED, LANES],
    ids=["blocks", "chain", "values of 16 bits", "codes", "rotated codes", "lanes"],
)
