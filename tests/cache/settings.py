"""A text, and the kinds of settings that each cache is tried with."""

from __future__ import annotations

import dataclasses

import pytest

from mlx_delta import DeltaConfig
from tests.attention.test_hybrid import inputs
from tests.tiny import SMALL

LENGTH = 150
TEXT = inputs(LENGTH)
CHAIN = DeltaConfig(block_size=8, window=8, keyframes=False, run_value="first")
PACKED = dataclasses.replace(SMALL, key_bits=16, value_bits=16)
CODED = dataclasses.replace(SMALL, key_bits=4)
each_setting = pytest.mark.parametrize(
    "config", [SMALL, CHAIN, PACKED, CODED], ids=["blocks", "chain", "packed", "coded"]
)
