"""What searches for the bits of stored keys and values share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn

from mlx_delta.attention.probe import Seen, held_layers, watch_keys
from mlx_delta.config import DeltaConfig
from mlx_delta.config_checks import MEAN_BITS
from mlx_delta.method.values import SCALE_BITS, value_group

from .divergence import Comparison

DENSE_BITS = 16


@dataclass(frozen=True)
class Tried:
    """Bits of keys and values on average, and what they do to a window.

    Attributes:
        key_bits: Of keys.
        value_bits: Of values.
        share: What a far token takes, of what it takes in 16 bits; grids, masks and scales counted.
        found: Against dense attention.
        level: What a run of held keys costs; ``None``: nothing is held, all keys are codes.
    """

    key_bits: float
    value_bits: float
    share: float
    found: Comparison
    level: float | None = None

    @property
    def loss(self) -> float:
        """The divergence from dense attention."""
        return self.found.divergence


@dataclass(frozen=True)
class Sizes:
    """What keys and values take besides their codes.

    Attributes:
        keys: Numbers of a token's keys, in all held layers.
        values: Those of its values.
        key_grid: Bits for each number of keys: their grids.
        value_grid: Bits for each number of values: their scales.
    """

    keys: int
    values: int
    key_grid: float
    value_grid: float

    @classmethod
    def of(cls, model: nn.Module, window: Sequence[int], config: DeltaConfig) -> Sizes:
        """Of a model with caches of a setting."""
        keys: list[int] = []
        values: dict[int, int] = {}

        def see(layer: int, seen: Seen) -> None:
            heads, head_dim = seen.values.shape[1], seen.values.shape[3]
            keys.append(seen.keys.shape[1] * seen.keys.shape[3])
            values[head_dim] = values.get(head_dim, 0) + heads * head_dim

        watch_keys(model, window, config, held_layers(model), see)
        numbers = sum(values.values())
        scales = sum(n * SCALE_BITS / value_group(size) for size, n in values.items())
        return cls(sum(keys), numbers, 2 * DENSE_BITS / config.block_size, scales / numbers)

    def share(self, key_bits: float, value_bits: float) -> float:
        """What codes take, of what 16 bits do."""
        bits = self.keys * (key_bits + self.key_grid)
        bits += self.values * (value_bits + self.value_grid)
        return bits / (DENSE_BITS * (self.keys + self.values))

    def bits(self, share: float, split: float) -> tuple[float, float]:
        """Bits of keys and of values for a share, the ones so many more than the others."""
        least, most = MEAN_BITS
        grids = self.keys * self.key_grid + self.values * self.value_grid
        room = DENSE_BITS * (self.keys + self.values) * share - grids
        low = max(least, (room - self.values * most) / self.keys)
        high = min(most, (room - self.values * least) / self.keys)
        of_keys = (room + self.values * split) / (self.keys + self.values)
        of_keys = min(max(of_keys, low), high)
        return of_keys, (room - self.keys * of_keys) / self.values

    def check(self, share: float) -> None:
        """Refuse a share that no codes have.

        Raises:
            ValueError: It is one.
        """
        least, most = (self.share(bits, bits) for bits in MEAN_BITS)
        if not least <= share <= most:
            raise ValueError(
                f"[calibrate] bytes must be between {least:.4g} and {most:.4g} of those in 16 bits "
                f"but got {share}."
            )
