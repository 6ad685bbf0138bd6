"""Sharing sparsity out: known answers, and what holds for any curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_delta.calibrate.loss import sparsest_within
from mlx_delta.calibrate.solve import Curve, cheapest_thresholds, mean_curve

FINE = np.linspace(0, 1, 401)


def test_a_threshold_is_read_off_the_curve_both_ways():
    curve = Curve(np.array([0.0, 1.0, 2.0, 4.0]), np.array([0.0, 0.3, 0.3, 0.5]), np.zeros(4))
    assert curve.sparsity_at(0.5) == pytest.approx(0.15)
    assert curve.threshold_for(0.15) == pytest.approx(0.5)
    assert curve.threshold_for(0.3) == 1.0, "the least threshold of a flat piece"
    assert curve.threshold_for(0.4) == pytest.approx(3.0)
    assert curve.threshold_for(0.9) == 4.0, "the last one where none reaches"


def test_a_curve_is_cut_off_behind_a_threshold():
    curve = Curve(np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.3, 0.4]), np.arange(3.0)).up_to(1.0)
    assert [x.tolist() for x in (curve.thresholds, curve.sparsity, curve.cost)] == [
        [0.0, 1.0],
        [0.0, 0.3],
        [0.0, 1.0],
    ]


def test_units_with_quadratic_costs_share_as_the_marginal_costs_are_equal():
    """cost = a s^2: the marginal costs 2 a s agree, so s goes as 1 / a."""
    weights = np.array([1.0, 2.0, 4.0])
    curves = [Curve(3 * FINE, FINE, a * FINE**2) for a in weights]
    wanted = 0.3 * 3 * (1 / weights) / (1 / weights).sum()
    np.testing.assert_allclose(
        cheapest_thresholds(curves, 0.3), 3 * wanted, atol=3 * (FINE[1] - FINE[0])
    )


def test_a_unit_that_costs_nothing_is_used_up_first():
    free = Curve(FINE, 0.8 * FINE, np.zeros_like(FINE))
    dear = Curve(FINE, 0.8 * FINE, FINE)
    assert cheapest_thresholds([dear, free], 0.4) == pytest.approx([0.0, 1.0])
    assert cheapest_thresholds([dear, free], 0.5) == pytest.approx([0.25, 1.0])


def test_a_dear_step_before_a_cheap_one_is_taken_with_it():
    """Between the ends of the hull the first half of the steps alone would be the dearer one."""
    step = Curve(np.array([0.0, 1, 2]), np.array([0.0, 0.4, 0.8]), np.array([0.0, 2.0, 2.1]))
    line = Curve(np.array([0.0, 1, 2]), np.array([0.0, 0.4, 0.8]), np.array([0.0, 1.5, 3.0]))
    assert cheapest_thresholds([step, line], 0.4) == pytest.approx([2.0, 0.0])


def test_what_is_beyond_reach_takes_the_last_thresholds():
    curve = Curve(np.array([0.0, 1.0]), np.array([0.0, 0.5]), np.array([0.0, 1.0]))
    assert cheapest_thresholds([curve, curve], 0.9) == [1.0, 1.0]


def test_a_shared_threshold_has_the_mean_of_curves_on_their_own_grids():
    first = Curve(np.array([0.0, 1.0]), np.array([0.0, 0.4]), np.array([0.0, 4.0]))
    second = Curve(np.array([0.0, 2.0]), np.array([0.0, 0.8]), np.array([0.0, 0.0]))
    mean = mean_curve([first, second])
    np.testing.assert_allclose(mean.thresholds, [0.0, 1.0, 2.0])
    np.testing.assert_allclose(mean.sparsity, [0.0, 0.4, 0.6])
    np.testing.assert_allclose(mean.cost, [0.0, 2.0, 2.0])


rises = arrays(np.float64, 6, elements=st.floats(0, 1))
curves = st.builds(
    lambda sparsity, cost: Curve(
        np.arange(7.0),
        np.concatenate([[0], np.cumsum(sparsity) / max(1, sparsity.sum())]),
        np.concatenate([[0], np.cumsum(cost)]),
    ),
    rises,
    rises,
)


@given(st.lists(curves, min_size=1, max_size=5), st.floats(0, 1))
def test_the_wanted_sparsity_is_hit_whatever_the_curves(units, share):
    highest = float(np.mean([curve.sparsity[-1] for curve in units]))
    wanted = share * highest
    chosen = cheapest_thresholds(units, wanted)
    got = np.mean([curve.sparsity_at(t) for curve, t in zip(units, chosen, strict=True)])
    assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("wanted", [0.0, 0.01, 0.3, 5.0])
def test_bisection_stays_within_the_wanted_loss(wanted):
    found = sparsest_within(lambda s: s**2, wanted, highest=0.9, steps=12)
    assert found == pytest.approx(min(0.9, wanted**0.5), abs=1e-3)
    assert found**2 <= wanted
