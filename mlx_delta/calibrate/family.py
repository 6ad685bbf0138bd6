"""The cheapest setting for every sparsity, from what was recorded and measured."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from mlx_delta.config import DeltaConfig

from .record import Recording
from .sensitivity import USUAL, Sensitivity
from .solve import Curve, cheapest_thresholds, mean_curve

Per = Literal["model", "layer", "head"]

DIGITS = 5  # significant ones of a threshold


class Family:
    """The cheapest setting for every sparsity.

    Args:
        base: Everything but the thresholds.
        recording: Sparsity of every kv head over thresholds, and the cost by attention errors.
        n_layers: Layers of the model, those without held keys included.
        per: What gets a threshold of its own.
        sensitivity: The cost instead: of layers for ``"layer"``, of kv heads for ``"head"``.
            Thresholds then go beyond ``USUAL`` only for a sparsity that is not reached without.
    """

    def __init__(
        self,
        base: DeltaConfig,
        recording: Recording,
        n_layers: int,
        per: Per,
        sensitivity: Sensitivity | None = None,
    ):
        self._base, self._recording, self._n_layers, self._per = base, recording, n_layers, per
        self._sensitivity = sensitivity
        grid, sparsity, cost = recording.thresholds, recording.sparsity, recording.cost
        self._heads = _curves(grid, sparsity, cost)
        self._layers = [mean_curve(heads) for heads in self._heads]
        self.uniform = mean_curve(self._layers)
        units = self._heads if per == "head" else [[layer] for layer in self._layers]
        if sensitivity is not None:
            shared = sparsity if per == "head" else sparsity.mean(axis=1, keepdims=True)
            units = _curves(grid, shared, sensitivity.cost(grid))
        self._units = [curve for layer in units for curve in layer]
        self._usual = self._units
        if sensitivity is not None:
            # A hair more: thresholds are products of floats.
            ends = recording.units * USUAL * (1 + 1e-6)
            self._usual = [
                c.up_to(end) for end, layer in zip(ends, units, strict=True) for c in layer
            ]

    def setting(self, sparsity: float) -> DeltaConfig:
        """The setting with this mean sparsity.

        Raises:
            ValueError: Even the highest recorded thresholds do not reach it.
        """
        self._check(sparsity)
        if self._per == "model":
            return self.uniform_setting(sparsity)
        reached = np.mean([curve.sparsity.max() for curve in self._usual])
        units = self._usual if sparsity <= reached else self._units
        chosen = [rounded(t) for t in cheapest_thresholds(units, sparsity)]
        thresholds: list[Any] = [0.0] * self._n_layers  # where there is nothing to hold
        n_heads = len(self._heads[0])
        for i, layer in enumerate(self._recording.layers):
            if self._per == "head":
                thresholds[layer] = tuple(chosen[i * n_heads : (i + 1) * n_heads])
            else:
                thresholds[layer] = chosen[i]
        return dataclasses.replace(self._base, threshold=tuple(thresholds))

    def uniform_setting(self, sparsity: float) -> DeltaConfig:
        """The setting with this mean sparsity that has one threshold for all layers."""
        self._check(sparsity)
        threshold = rounded(self.uniform.threshold_for(sparsity))
        return dataclasses.replace(self._base, threshold=threshold)

    def _check(self, sparsity: float) -> None:
        if sparsity > self.highest + 1e-6:
            raise ValueError(beyond(sparsity, None, self.highest))

    def sparsity_of(self, config: DeltaConfig) -> float:
        """Mean sparsity that a setting has on the recorded curves."""
        heads = [curve for layer in self._heads for curve in layer]
        pairs = zip(heads, self._thresholds(config, len(self._heads[0])), strict=True)
        return float(np.mean([curve.sparsity_at(t) for curve, t in pairs]))

    def divergence_of(self, config: DeltaConfig) -> float:
        """KL divergence in nats per token that a setting is expected to have.

        The sum of what its layers, or their heads, have alone.
        """
        assert self._sensitivity is not None
        per_layer = len(self._units) // len(self._heads)
        pairs = zip(self._units, self._thresholds(config, per_layer), strict=True)
        held = sum(float(np.interp(t, curve.thresholds, curve.cost)) for curve, t in pairs)
        return held + float(self._sensitivity.stored.sum())

    def _thresholds(self, config: DeltaConfig, per_layer: int) -> list[float]:
        """A setting's thresholds: one for each layer, or for each of its heads."""
        own = [config.for_layer(i, self._n_layers) for i in self._recording.layers]
        return [layer.for_head(h).head_threshold for layer in own for h in range(per_layer)]

    @property
    def highest(self) -> float:
        """The highest sparsity that it reaches."""
        return float(np.mean([curve.sparsity.max() for curve in self._layers]))


def _curves(thresholds: np.ndarray, sparsity: np.ndarray, cost: np.ndarray) -> list[list[Curve]]:
    """Curves [layers][units] of thresholds [layers, G]; the others are [layers, units, G]."""
    return [
        [Curve(grid, *curve) for curve in zip(*layer, strict=True)]
        for grid, *layer in zip(thresholds, sparsity, cost, strict=True)
    ]


def rounded(threshold: float) -> float:
    """Short enough to be read in a config.json."""
    return float(f"{threshold:.{DIGITS}g}")


def beyond(sparsity: float, length: int | None, highest: float) -> str:
    """The error message for a sparsity that can't be reached."""
    where = "on this text" if length is None else f"in {length} tokens"
    return (
        f"[calibrate] a sparsity of {sparsity:g} can't be reached {where}: with everything held "
        f"but the exact window, sinks and keyframes it is {highest:.4f}; ask for less, or give a "
        "larger --length."
    )
