"""95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # a normal variable stays within so many standard deviations in 95 of 100

_T = (12.706, 4.303, 3.182, 2.776)  # the same for Student's t with 1, 2, 3 and 4 degrees of freedom


def student(freedom: int) -> float:
    """What :data:`Z` is for a deviation that was itself estimated, from few samples.

    The expansion of Student's t in 1 / freedom (Cornish-Fisher), within 0.004 of it.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


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
    half = student(n - 1) * error
    return float(value), float(value - half), float(value + half)


def mean(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean and its interval; see :func:`ratio`."""
    return ratio(values, np.ones(len(values)).tolist())
