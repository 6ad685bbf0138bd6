"""Confidence intervals, against tables and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_delta.measure.stats import Z, mean, ratio, student, wilson


# Published values of Wilson's interval (Newcombe 1998, and its textbook examples).
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


# 97.5 % points of Student's t, from any table.
@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.706), (4, 2.776), (5, 2.571), (7, 2.365), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_student(freedom, value):
    assert student(freedom) == pytest.approx(value, abs=0.004)
    assert student(freedom) > Z


def test_a_mean_is_covered_as_often_as_promised():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        _, low, high = mean(rng.normal(3.0, 2.0, 6).tolist())
        covered += low <= 3.0 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_ratio_of_equal_samples_has_no_error_and_one_sample_says_nothing_of_it():
    assert ratio([1, 2, 3], [2, 4, 6]) == (0.5, 0.5, 0.5)
    assert ratio([3], [4]) == (0.75, 0.75, 0.75)
