"""What a model and a text take, and what is advised where that is too much."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_delta.config import DeltaConfig
from mlx_delta.generate import make_caches
from mlx_delta.measure import limit
from mlx_delta.measure.limit import Plan, check_plan, said_of_caches
from mlx_delta.system.kv import kv_fields
from tests.tiny import llama_model

PLAN = Plan(weights=100_000_000, layers=30, kv_heads=3, head_dim=64, width=5000, step=512)
TOKENS = 16_000
KINDS = {name: DeltaConfig().changed(**kv_fields(name)) for name in ("small", "balanced", "exact")}


def refused(monkeypatch, free, setting):
    """The message for so many free bytes."""
    monkeypatch.setattr(limit, "free_memory", lambda: (free, "the limit"))
    with pytest.raises(MemoryError) as error:
        check_plan("model", PLAN, setting, TOKENS)
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "advised"),
    [
        (DeltaConfig(), ["balanced", "small"]),
        (KINDS["exact"], ["balanced", "small"]),
        (KINDS["balanced"], ["small"]),
        (KINDS["small"], []),
        (None, ["balanced", "small"]),
    ],
    ids=["in full", "exact", "balanced", "small", "dense"],
)
def test_smaller_caches_are_advised_with_what_they_take(monkeypatch, setting, advised):
    said = refused(monkeypatch, PLAN.needed(setting, TOKENS) - 1, setting)
    without = "" if setting is not None else " without --no-delta"
    for name, config in KINDS.items():
        size = limit.show_bytes(PLAN.needed(config, TOKENS))
        assert (f"--kv {name}{without} takes {size}" in said) == (name in advised)
    assert "tokens fit as it is" in said and "bits 4" not in said


def test_only_what_fits_is_advised(monkeypatch):
    between = (PLAN.needed(KINDS["small"], TOKENS) + PLAN.needed(KINDS["balanced"], TOKENS)) // 2
    said = refused(monkeypatch, between, DeltaConfig())
    assert "--kv small takes" in said and "--kv balanced" not in said
    nothing = refused(monkeypatch, 1000, DeltaConfig())
    assert nothing.endswith("; use a smaller or more strongly quantized model.")


def test_a_chain_is_advised_no_codes(monkeypatch):
    said = refused(monkeypatch, PLAN.needed(None, TOKENS) - 1, DeltaConfig.paper())
    assert "--kv" not in said and "tokens fit as it is" in said


@pytest.mark.parametrize("name", ["small", "balanced"])
def test_what_caches_take_is_told_of_a_model_that_stores_them_small(name):
    model = llama_model(KINDS[name], head_dim=64)
    said = said_of_caches(model)
    plan = Plan.of_model(model)
    own, dense = plan.caches(KINDS[name], 2048), plan.caches(None, 2048)
    assert said.startswith(f"; 2048 tokens take about {limit.show_bytes(own)} (dense: 6 MB)")
    assert dense == 3 * 2 * 2048 * 128 * 4
    assert said.endswith("up to 6 MB written out while decoding, without a GPU")
    caches = make_caches(model)
    mx.eval(model(mx.zeros((1, 2048), mx.int32), cache=caches))
    assert own == pytest.approx(sum(cache.nbytes for cache in caches), rel=0.1)


@pytest.mark.parametrize("setting", [None, DeltaConfig(), KINDS["exact"]], ids=str)
def test_nothing_is_told_of_caches_in_full(setting):
    assert said_of_caches(llama_model(setting)) == ""
