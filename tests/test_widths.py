"""Widths of codes: within the wanted mean, more where errors cost more, alike in all heads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method.codes import count_rows, order_of
from mlx_delta.models.parts import of_own_layers, share_of_heads
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.widths import (
    VALUE_WIDTHS,
    WIDTHS,
    choose_key_widths,
    even_key_widths,
    share_key_bits,
    share_value_bits,
)

RNG = np.random.default_rng(0)
COSTS = [RNG.lognormal(0, 2, (2, 64)) * scale for scale in (1, 30, 0.1)]


def stored_bits(widths: np.ndarray) -> float:
    """Bits of a channel in the words of a block."""
    return 32 * count_rows(order_of(widths)[1]) / widths.shape[1]


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 6, 8])
def test_keys_take_the_wanted_bits(bits):
    found = share_key_bits(COSTS, bits)
    mean = np.mean([stored_bits(widths) for widths in found])
    assert bits - 0.1 < mean <= bits + 1e-9
    for widths in found:
        assert set(widths.ravel()) <= set(WIDTHS)
        counts = [np.unique(head, return_counts=True) for head in widths]
        np.testing.assert_array_equal(counts[0], counts[1])
        np.testing.assert_array_equal(widths[:, :32], widths[:, 32:])  # pairs


def test_what_costs_more_gets_more():
    first, second, third = share_key_bits(COSTS, 3)
    assert stored_bits(second) > stored_bits(first) > stored_bits(third)
    for cost, widths in zip(COSTS, (first, second, third), strict=True):
        for own, given in zip(cost, widths, strict=True):
            pairs = own[:32] + own[32:]
            order = np.argsort(-pairs, kind="stable")
            assert (np.diff(given[:32][order]) <= 0).all()


def test_no_other_widths_of_as_many_rows_cost_less():
    """Of one layer with few channels: against all ways there are."""
    cost = np.sort(RNG.lognormal(0, 1.5, 16))[::-1]
    costs = np.concatenate([cost, cost])[None]
    (found,) = share_key_bits([costs], 3)
    rows = count_rows(order_of(found)[1])

    def loss(widths: np.ndarray) -> float:
        return float((costs[0] / (2.0**widths - 1) ** 2).sum())

    others = []
    for a, b in itertools.combinations_with_replacement(range(17), 2):
        for kinds in itertools.combinations(WIDTHS, 3):
            half = np.repeat(kinds, [a, b - a, 16 - b])
            widths = np.concatenate([half, half])
            if count_rows(order_of(widths[None])[1]) <= rows:
                others.append(loss(widths))
    assert loss(found[0]) == pytest.approx(min(others))


@pytest.mark.parametrize("bits", [2, 2.5, 3.5, 8])
def test_values_take_the_wanted_bits(bits):
    costs = [RNG.lognormal(0, 2, 8) for _ in range(10)]
    found = share_value_bits(costs, bits)
    widths = np.concatenate(found)
    assert set(widths) <= set(VALUE_WIDTHS) and bits - 0.1 < widths.mean() <= bits
    order = np.argsort(-np.concatenate(costs))
    assert (np.diff(widths[order]) <= 0).all()


def test_channels_that_count_alike_get_one_width_where_they_can():
    assert (even_key_widths(2, 64, 4) == 4).all()
    assert stored_bits(even_key_widths(2, 64, 3.5)) == 3.5


def test_a_setting_gives_each_layer_its_own_widths():
    weights = [RNG.lognormal(0, 1, (2, 64)).astype(np.float32) for _ in range(2)]
    found = Sensitivities([weights[0], None, weights[1]]).with_spread(
        [np.ones((2, 64)), None, 9 * np.ones((2, 64))],
        [np.array([1.0, 9.0]), None, np.array([1.0, 99.0])],
    )
    config = DeltaConfig(
        key_format="codes", key_bits=3, value_format="rotated", value_bits=3, sensitivities=found
    )
    first, none, last = (config.for_layer(i, 3) for i in range(3))
    assert none.key_widths is None and none.value_widths is None
    sizes = [sum(map(int, "".join(x.key_widths[0]))) for x in (first, last)]
    assert sizes[0] < sizes[1] and sum(first.value_widths[0]) < sum(last.value_widths[0])
    assert first.sensitivities is None, "the widths say all"
    assert DeltaConfig.from_dict(first.to_dict()) == first == first.for_layer(0, 1)
    assert choose_key_widths(Sensitivities(weights), 3) is None


def test_shares_of_a_model_have_the_widths_that_the_whole_has():
    """By heads or by layers: a process must not choose by what it has alone."""
    found = Sensitivities([RNG.lognormal(0, 1, (2, 64)) for _ in range(3)]).with_spread(
        [np.full((2, 64), size) for size in (1, 5, 2)], [np.array([1.0, 9.0])] * 3
    )
    config = DeltaConfig(
        key_format="codes", key_bits=3, value_format="rotated", value_bits=3, sensitivities=found
    )
    whole = [config.for_layer(i, 3) for i in range(3)]
    halves = [share_of_heads(config, rank, 2) for rank in range(2)]
    for i, layer in enumerate(whole):
        own = [half.for_layer(i, 3) for half in halves]
        assert own[0].key_widths[0] + own[1].key_widths[0] == layer.key_widths[0]
        assert own[0].value_widths[0] + own[1].value_widths[0] == layer.value_widths[0]
    part = of_own_layers(config, slice(1, 3), 2)
    assert [part.for_layer(i, 2) for i in range(2)] == whole[1:]
