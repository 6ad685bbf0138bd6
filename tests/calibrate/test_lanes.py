"""Held keys for wanted bytes: bits are chosen so that no more is taken, where least is lost."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.calibrate.divergence import Comparison
from mlx_delta.calibrate.lanes import MOST_TRIED, LaneSearch
from mlx_delta.calibrate.tried import Sizes
from mlx_delta.sensitivities import Sensitivities

CURVE = [(0, 0, 0), (0.1, 0.6, 0.001), (0.2, 0.7, 0.002), (0.4, 0.8, 0.004)]
CONFIG = DeltaConfig(level=0.1, sensitivities=Sensitivities([np.ones((2, 32))], CURVE))
SIZES = Sizes(keys=600, values=600, key_grid=0.5, value_grid=0.125)


class Text:
    """Of which a setting takes more than is reckoned; every bit more takes a part of the loss."""

    def __init__(self, holding: float, more: float = 0.01):
        self.holding, self.more = holding, more

    def compare(self, config: DeltaConfig) -> Comparison:
        assert (config.key_format, config.value_format) == ("deltas", "rotated")
        zeros = float(np.interp(config.run_level, [row[0] for row in CURVE], [0, 0.6, 0.7, 0.8]))
        bits = 1.375 + (1 - zeros) * config.key_bits + 0.125 + config.value_bits
        loss = 4.0**-config.key_bits + 4.0**-config.value_bits + self.holding * zeros**8
        return Comparison(loss, 1.0, zeros, None, bits / 32 + self.more)


def search(holding: float, more: float = 0.01) -> LaneSearch:
    return LaneSearch(Text(holding, more), CONFIG, SIZES, lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.15, 0.17, 0.2])
def test_no_more_bytes_are_taken_than_wanted(share):
    tried = search(0.01)
    best = tried.with_share(share)
    assert best is not None and share - 0.002 < best.share <= share
    fits = [x for x in tried.tried if x.share <= share]
    assert best.loss == min(x.loss for x in fits)
    assert len(tried.tried) <= MOST_TRIED


def test_more_is_held_where_holding_costs_little():
    levels = [search(holding).with_share(0.16).level for holding in (0.0, 10.0)]
    assert levels[0] > levels[1]


def test_what_the_curve_does_not_reach_is_not_tried():
    config = CONFIG.changed(sensitivities=Sensitivities([np.ones((2, 32))], CURVE[:3]))
    tried = LaneSearch(Text(0.0), config, SIZES, lambda: None)  # type: ignore[arg-type]
    assert tried.with_share(0.17) is not None
    assert max(x.found.zeros for x in tried.tried) <= 0.7


def test_no_bits_are_so_few():
    assert search(0.0).with_share(0.1) is None


def test_fewer_bytes_for_a_wanted_divergence():
    loose, strict = (search(0.01).with_divergence(wanted, 0.2) for wanted in (0.05, 0.02))
    assert loose.loss <= 0.05 and strict.loss <= 0.02
    assert loose.share < strict.share < 0.2
    assert search(0.01).with_divergence(1e-6, 0.2) is None
