"""95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # a normal variable stays within so many standard deviations in 95 of 100


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share: sensible at 0 and 1 too, unlike the normal one.

    Args:
        right: Answers that were right.
        total: Answers, at least one.
    """
    share, z2 = right / total, Z * Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == total else centre + half
    return low, high


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """A ratio of sums over samples, and its interval from how the samples differ.

    With equal denominators it is the mean and its usual interval. A single sample says nothing
    about its error: the interval is then the value itself.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    value = top.sum() / bottom.sum()
    n = len(top)
    if n < 2:
        return float(value), float(value), float(value)
    residuals = top - value * bottom
    error = math.sqrt(float((residuals**2).sum()) / (n * (n - 1))) / bottom.mean()
    return float(value), float(value - Z * error), float(value + Z * error)


def mean(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean and its interval; see :func:`ratio`."""
    return ratio(values, np.ones(len(values)).tolist())
