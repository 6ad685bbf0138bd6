"""Held keys by lanes for wanted bytes: how much is held, and with how many bits.

With few bytes, held keys lose less than codes of every key (:mod:`mlx_delta.method.deltas`). What
they take follows from what the text lets them hold, so it is measured: bits are chosen as if eight
channels always had a mask, and again with what that was wrong by.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mlx_delta.config import DeltaConfig
from mlx_delta.widths import LANE_WIDTHS

from .divergence import DenseText
from .tried import Sizes, Tried

ZEROS = (0.65, 0.75, 0.8)  # shares of zeros that are tried
SPLIT = 0.75  # bits of a held number more than of a value's, at first
SPLIT_STEP = 0.5
MASK_BITS = 1.0
GRID_BITS = 24  # of a channel and block
MOST_ROUNDS = 2  # of bits, for a share of zeros and a split
MOST_TRIED = MOST_ROUNDS * (len(ZEROS) + 2)  # for a share
STEP, MOST_STEPS = 0.93, 4  # of shares that are tried for a wanted divergence


class LaneSearch:
    """Held keys by measurement.

    Args:
        text: What settings are compared on.
        config: With sensitivities that say what levels hold, and what errors cost.
        sizes: Of the model's keys and values.
        progress: Called after each measurement.
    """

    def __init__(
        self, text: DenseText, config: DeltaConfig, sizes: Sizes, progress: Callable[[], None]
    ):
        self._text, self._config, self._sizes = text, config, sizes
        self._progress = progress
        self._beyond = 0.0  # by how much more bytes are taken than was reckoned
        self._where = (0.0, SPLIT)  # share of zeros and split of what is best so far
        self.tried: list[Tried] = []

    def setting(self, tried: Tried) -> DeltaConfig:
        """The setting that stores keys and values so."""
        return self._with(tried.key_bits, tried.value_bits, tried.level)

    def _with(self, key_bits: float, value_bits: float, level: float | None) -> DeltaConfig:
        fields = {"key_format": "deltas", "key_bits": key_bits, "value_bits": value_bits}
        return self._config.changed(**fields, level=level, key_widths=None, value_widths=None)

    def with_share(self, share: float) -> Tried | None:
        """The least divergence for a share of bytes; ``None`` if no bits are so few."""
        curve = self._config.loaded_sensitivities.curve
        reached = max((zeros for _, zeros, _ in curve), default=0.0)
        best = None
        for zeros in ZEROS:
            if zeros <= reached:
                best = self._better(best, share, zeros, SPLIT)
        if best is not None:
            for split in (SPLIT + SPLIT_STEP, SPLIT - SPLIT_STEP):
                best = self._better(best, share, self._where[0], split)
        return best

    def with_divergence(self, wanted: float, share: float) -> Tried | None:
        """The least bytes with at most this divergence, and less than a share of bytes.

        ``None`` if there are none.
        """
        best, found = None, self.with_share(share)
        for _ in range(MOST_STEPS):
            if found is None or found.loss > wanted:
                break
            best, found = found, self._measure(STEP * found.share, *self._where)
        return best

    def _better(self, best: Tried | None, share: float, zeros: float, split: float) -> Tried | None:
        found = self._measure(share, zeros, split)
        if found is None or (best is not None and best.loss <= found.loss):
            return best
        self._where = zeros, split
        return found

    def _measure(self, share: float, zeros: float, split: float) -> Tried | None:
        """Bits for a share of bytes at which no more is taken, and what they do."""
        level = float(f"{self._config.loaded_sensitivities.level_for(zeros):.4g}")
        for _ in range(MOST_ROUNDS):
            bits = self._bits(share - self._beyond, zeros, split)
            if bits is None:
                return None
            found = self._text.compare(self._with(*bits, level))
            assert found.far_share is not None
            tried = Tried(*bits, found.far_share, found, level)
            self.tried.append(tried)
            self._progress()
            if found.far_share <= share:
                return tried
            self._beyond += found.far_share - share
        return None

    def _bits(self, share: float, zeros: float, split: float) -> tuple[float, float] | None:
        """Bits of keys and of values, rounded down; ``None`` if there are not so few."""
        keys, values = self._sizes.keys, self._sizes.values
        masks = MASK_BITS + GRID_BITS / self._config.block_size
        room = 16 * (keys + values) * share - keys * masks - values * self._sizes.value_grid
        kept = keys * (1 - zeros)  # numbers of keys that are stored
        least, most = int(LANE_WIDTHS[0]), int(LANE_WIDTHS[-1])
        of_values = max(float(least), (room - kept * split) / (kept + values))
        of_keys = min(float(most), (room - values * of_values) / kept)
        of_values = min(float(most), (room - kept * of_keys) / values)
        pair = tuple(math.floor(1000 * x + 1e-6) / 1000 for x in (of_keys, of_values))
        return (pair[0], pair[1]) if min(pair) >= least else None
