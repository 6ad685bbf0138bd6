"""Choosing thresholds: the cheapest way to a wanted sparsity.

A unit is what has a threshold of its own: a layer, a kv head, or the whole model. Each has a curve
of sparsity and of cost over thresholds. Skipping is shared out so that the next skipped
multiply-accumulate costs the same everywhere: on the lower convex hulls of cost against sparsity,
the cheapest segments are taken first until the wanted sparsity is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A unit's sparsity and cost over thresholds.

    Attributes:
        thresholds: [G], ascending.
        sparsity: [G].
        cost: [G].
    """

    thresholds: np.ndarray
    sparsity: np.ndarray
    cost: np.ndarray

    def up_to(self, threshold: float) -> Curve:
        """The part of the curve at thresholds of no more than this."""
        kept = self.thresholds <= threshold
        return Curve(self.thresholds[kept], self.sparsity[kept], self.cost[kept])

    def sparsity_at(self, threshold: float) -> float:
        """Between grid points, linearly."""
        return float(np.interp(threshold, self.thresholds, self.sparsity))

    def threshold_for(self, sparsity: float) -> float:
        """The least threshold that reaches a sparsity; the last one if none does."""
        # A curve may stand still, or fall by a hair: what was reached stays reached.
        reached = np.maximum.accumulate(self.sparsity)
        i = int(np.searchsorted(reached, sparsity))
        if i in (0, len(reached)):
            return float(self.thresholds[min(i, len(reached) - 1)])
        step = slice(i - 1, i + 1)
        return float(np.interp(sparsity, reached[step], self.thresholds[step]))


def mean_curve(curves: list[Curve]) -> Curve:
    """The curve of units that share their threshold; equal weights."""
    thresholds = np.unique(np.concatenate([curve.thresholds for curve in curves]))
    sparsity = [np.interp(thresholds, c.thresholds, c.sparsity) for c in curves]
    cost = [np.interp(thresholds, c.thresholds, c.cost) for c in curves]
    return Curve(thresholds, np.mean(sparsity, axis=0), np.mean(cost, axis=0))


def cheapest_thresholds(curves: list[Curve], sparsity: float) -> list[float]:
    """A threshold for each unit, with this mean sparsity over all of them at the least cost.

    Args:
        curves: One for each unit; they count equally.
        sparsity: Wanted mean; beyond what the curves reach, their last thresholds are taken.
    """
    segments = []
    for unit, curve in enumerate(curves):
        hull = _lower_hull(np.maximum.accumulate(curve.sparsity), curve.cost)
        for (x0, y0), (x1, y1) in zip(hull[:-1], hull[1:], strict=True):
            segments.append(((y1 - y0) / (x1 - x0), unit, x1 - x0))
    reached = [float(curve.sparsity[0]) for curve in curves]
    missing = sparsity * len(curves) - sum(reached)
    for _, unit, step in sorted(segments):
        step = min(step, max(0.0, missing))
        reached[unit] += step
        missing -= step
    return [curve.threshold_for(x) for curve, x in zip(curves, reached, strict=True)]


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """The lower convex hull of points with ascending x, from the first to the last x."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        if hull and point[0] <= hull[-1][0]:
            if point[1] >= hull[-1][1]:
                continue
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
