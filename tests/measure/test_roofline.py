"""Decode ceilings: bytes of filled caches, extrapolated, against a chip's bandwidth."""

from __future__ import annotations

import pytest

from mlx_delta.measure import roofline
from mlx_delta.measure.filling import prefill
from mlx_delta.measure.roofline import Ceiling, ceilings, extrapolate
from mlx_delta.measure.settings import parse_settings
from mlx_delta.measure.traffic import decode_traffic
from mlx_delta.system.chips import Chip
from tests.tiny import SMALL, llama_model, tokens


@pytest.fixture(scope="module")
def model():
    return llama_model(head_dim=64)


@pytest.fixture(scope="module")
def ids():
    return tokens(400)[0].tolist()


def test_a_ceiling_is_bandwidth_by_bytes():
    ceiling = Ceiling("dense", 1000, 900_000_000, 100_000_000, False)
    chip = Chip("M0", 50)
    assert ceiling.tokens_per_second(chip) == 50
    assert ceiling.expected(chip) == (35, pytest.approx(42.5))


def test_a_line_through_two_points():
    assert extrapolate([(100, 1000), (200, 1500)], 1000) == 5500
    assert extrapolate([(48, 77), (48, 77)], 48) == 77


def test_bytes_are_those_of_filled_caches_and_go_on_alike(model, ids):
    names = ["dense", "delta:key_format=codes,key_bits=4", "kv8", "rotating:32", "window-only"]
    settings = parse_settings(names, SMALL)
    found = ceilings(model, settings, ids, [56, 184, 4000], longest=100)
    by_name = {(c.setting, c.context): c for c in found}
    assert [c.extrapolated for c in found] == [False] * 5 + [True] * 10
    assert len({c.weight_bytes for c in found}) == 1
    for setting in settings:
        for context in (56, 184):
            caches = setting.make_caches(model, context)
            prefill(model, setting, ids[:context], caches)
            real = decode_traffic(model, caches).cache_bytes
            near = 0.05 if setting.name.startswith("delta:") and context > 100 else 0
            got = by_name[setting.name, context].cache_bytes
            assert got == pytest.approx(real, rel=near), (setting.name, context)
    sizes = {name: by_name[name, 4000].cache_bytes for name in names}
    assert sizes["dense"] == 3 * 2 * 2 * 64 * 2 * 4000
    assert sizes["rotating:32"] == by_name["rotating:32", 56].cache_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": []}, r"\[ceilings\] settings is empty"),
        ({"longest": 401}, "longest must be <= the 400 tokens of the text but got 401"),
        ({"longest": 4000}, "of 4000 tokens is longer than the model's"),
        ({"longest": 40}, "longest must be more than 64 for delta to be extrapolated from"),
    ],
)
def test_misuse_of_ceilings(model, ids, arguments, message):
    values = {"settings": parse_settings(["delta"], SMALL), "longest": 400, "contexts": [5000]}
    with pytest.raises(ValueError, match=message):
        ceilings(model, tokens=ids, **{**values, **arguments})


def test_caches_that_memory_cannot_hold_are_not_filled(model, ids, monkeypatch):
    monkeypatch.setattr(roofline, "physical_memory", lambda: 10**6)
    with pytest.raises(MemoryError, match=r"to 200 tokens takes about 0 GB with dense .*--longest"):
        ceilings(model, parse_settings(["dense"]), ids, [200], longest=200)
