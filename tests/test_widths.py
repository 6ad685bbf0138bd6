"""Widths of codes: within the wanted mean, and more where errors cost more."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from mlx_delta import DeltaConfig
from mlx_delta.method.codes import order_of
from mlx_delta.models.parts import of_own_layers, share_of_heads
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.widths import (
    FIELDS,
    VALUE_WIDTHS,
    WIDTHS,
    choose_key_widths,
    even_key_widths,
    even_lane_widths,
    rows_of,
    share_key_bits,
    share_lane_bits,
    share_value_bits,
)

RNG = np.random.default_rng(0)
COSTS = [RNG.lognormal(0, 2, (2, 64)) * scale for scale in (1, 30, 0.1)]


def stored_bits(widths: np.ndarray) -> float:
    """Bits of a channel in the words of a block."""
    rows = sum(sum(order_of(head)[1]) for head in widths)
    assert widths.mean() == 32 * rows / widths.size, "words are full"
    return float(widths.mean())


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4, 6, 8])
def test_keys_take_the_wanted_bits(bits):
    found = share_key_bits(COSTS, bits)
    mean = np.mean([stored_bits(widths) for widths in found])
    assert bits - 0.1 < mean <= bits + 1e-9
    for widths in found:
        assert set(widths.ravel()) <= set(WIDTHS)
        np.testing.assert_array_equal(widths[:, :32], widths[:, 32:])  # pairs


def test_what_costs_more_gets_more():
    first, second, third = share_key_bits(COSTS, 3)
    assert stored_bits(second) > stored_bits(first) > stored_bits(third)
    for cost, widths in zip(COSTS, (first, second, third), strict=True):
        for own, given in zip(cost, widths, strict=True):
            pairs = own[:32] + own[32:]
            order = np.argsort(-pairs, kind="stable")
            assert (np.diff(given[:32][order]) <= 0).all()


def all_rows(pairs: int, kinds: tuple[int, ...] = tuple(FIELDS)) -> list[tuple[int, ...]]:
    """All ways to fill rows with so many pairs."""
    if len(kinds) == 1:
        return [] if pairs % kinds[0] else [(pairs // kinds[0],)]
    return [
        (n, *rest)
        for n in range(pairs // kinds[0] + 1)
        for rest in all_rows(pairs - n * kinds[0], kinds[1:])
    ]


def widths_of(rows: tuple[int, ...]) -> np.ndarray:
    """Widths of a head's pairs, descending."""
    kinds = zip(FIELDS.values(), rows, strict=True)
    return np.array(sorted(sum((fields * n for fields, n in kinds), ()), reverse=True))


def test_no_other_rows_as_many_cost_less():
    """Of one head with few channels: against all rows that there are."""
    cost = np.sort(RNG.lognormal(0, 1.5, 16))[::-1]

    def loss(half: np.ndarray) -> float:
        return float(2 * (cost / (2.0**half - 1) ** 2).sum())

    for bits in (3, 4):
        (found,) = share_key_bits([np.concatenate([cost, cost])[None]], bits)
        others = [rows for rows in all_rows(16) if sum(rows) <= bits * 16 / 16]
        assert loss(found[0, :16]) == pytest.approx(min(loss(widths_of(x)) for x in others))


@pytest.mark.parametrize("pairs", [8, 12, 16])
def test_rows_are_known_by_their_widths(pairs):
    """Where the same widths fill rows of several kinds, there are as many of these."""
    found = functools.reduce(
        lambda seen, rows: {**seen, rows: widths_of(rows)}, all_rows(pairs), {}
    )
    assert len(found) > 5
    for rows, widths in found.items():
        own = rows_of("".join(map(str, widths)) * 2)
        assert own is not None and sum(own) == sum(rows)
        np.testing.assert_array_equal(widths_of(own), widths)


@pytest.mark.parametrize(
    "widths",
    ["", "4", "44", "44444443" * 2, "3" * 32, "8888" + "8884", "7777" * 2, "44x4" * 2, "888" * 2],
)
def test_widths_that_fill_no_rows(widths):
    assert rows_of(widths) is None


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
    assert (np.ptp(even_key_widths(3, 80, 3.3), axis=0) == 0).all(), "alike in all heads"


def test_a_setting_gives_each_layer_its_own_widths():
    weights = [RNG.lognormal(0, 1, (2, 64)).astype(np.float32) for _ in range(2)]
    found = Sensitivities([weights[0], None, weights[1]]).with_spread(
        [np.ones((2, 64)), None, 9 * np.ones((2, 64))],
        [np.array([1.0, 9.0]), None, np.array([1.0, 99.0])],
    )
    config = DeltaConfig(key_format="codes", key_bits=3, value_bits=3, sensitivities=found)
    first, none, last = (config.for_layer(i, 3) for i in range(3))
    assert none.key_widths is None and none.value_widths is None
    sizes = [sum(map(int, "".join(x.key_widths[0]))) for x in (first, last)]
    assert sizes[0] < sizes[1] and sum(first.value_widths[0]) < sum(last.value_widths[0])
    assert none.sensitivities is None and first.sensitivities == Sensitivities([weights[0]])
    assert DeltaConfig.from_dict(first.to_dict()) == first == first.for_layer(0, 1)
    assert choose_key_widths(Sensitivities(weights), 3) is None


@pytest.mark.parametrize("bits", [2, 2.5, 3.5, 4, 7])
def test_lanes_take_the_wanted_bits(bits):
    """Both channels of a pair alike, eight channels or a multiple of each width."""
    found = share_lane_bits(COSTS, bits)
    mean = np.mean([widths.mean() for widths in found])
    assert bits - 0.1 < mean <= bits + 1e-9
    for widths, cost in zip(found, COSTS, strict=True):
        for head, own in zip(widths, cost, strict=True):
            np.testing.assert_array_equal(*np.split(head, 2))
            assert not (np.unique(head, return_counts=True)[1] % 8).any()
            pairs = np.add(*np.split(own, 2))
            assert (np.diff(head[:32][np.argsort(-pairs)]) <= 0).all(), (
                "no less for what costs more"
            )
    sums = [widths.sum() for widths in found]
    assert sums[2] <= sums[0] <= sums[1]


def test_held_keys_of_a_layer_keep_their_sensitivities():
    """They say where runs end, and the widths come from those of the whole model."""
    weights = [RNG.lognormal(0, 1, (2, 64)).astype(np.float32) for _ in range(2)]
    spread = [np.ones((2, 64)), 9 * np.ones((2, 64))]
    found = Sensitivities(weights).with_spread(spread, [np.ones(2)] * 2)
    config = DeltaConfig(key_format="deltas", key_bits=4, sensitivities=found)
    first, last = (config.for_layer(i, 2) for i in range(2))
    sizes = [sum(map(int, "".join(x.key_widths[0]))) for x in (first, last)]
    assert sizes[0] < 4 * 128 < sizes[1] and sum(sizes) <= 4 * 256
    assert first.sensitivities == found.for_layer(0, 2)
    assert DeltaConfig.from_dict(first.to_dict()) == first == first.for_layer(0, 1)
    assert DeltaConfig(key_format="deltas", key_bits=4).for_layer(0, 2).key_widths is None
    assert sorted(even_lane_widths(2, 64, 3.5).ravel().tolist()) == [3] * 64 + [4] * 64


def test_shares_of_a_model_have_the_widths_that_the_whole_has():
    """By heads or by layers: a process must not choose by what it has alone."""
    found = Sensitivities([RNG.lognormal(0, 1, (2, 64)) for _ in range(3)]).with_spread(
        [np.full((2, 64), size) for size in (1, 5, 2)], [np.array([1.0, 9.0])] * 3
    )
    config = DeltaConfig(key_format="codes", key_bits=3, value_bits=3, sensitivities=found)
    whole = [config.for_layer(i, 3) for i in range(3)]
    halves = [share_of_heads(config, rank, 2) for rank in range(2)]
    for i, layer in enumerate(whole):
        own = [half.for_layer(i, 3) for half in halves]
        assert own[0].key_widths[0] + own[1].key_widths[0] == layer.key_widths[0]
        assert own[0].value_widths[0] + own[1].value_widths[0] == layer.value_widths[0]
    part = of_own_layers(config, slice(1, 3), 2)
    assert [part.for_layer(i, 2) for i in range(2)] == whole[1:]
