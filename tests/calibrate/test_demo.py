"""Calibrating the bundled demo model: what was asked for is what unseen text gets."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, load, measure_sparsity
from mlx_delta.calibrate import calibrate
from mlx_delta.calibrate.loss import mean_loss
from mlx_delta.evaluate.text import BUNDLED_TEXT, encode_text, read_text
from mlx_delta.settings import Setting

LENGTH = 1024


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, list[int], list[list[int]]]:
    """The model, its tokenizer, the beginning of a book, and two windows of the rest."""
    model, tokenizer = load("demo", DeltaConfig())
    ids = encode_text(tokenizer, read_text(BUNDLED_TEXT))
    seen, rest = ids[: 5 * LENGTH], ids[7 * LENGTH :]
    return model, tokenizer, seen, [rest[i : i + LENGTH] for i in (0, 3 * LENGTH)]


def prefill_sparsity(model: Any, config: DeltaConfig, windows: list[list[int]]) -> float:
    sparsity = []
    for window in windows:
        caches = Setting("delta", "delta", config).make_caches(model, len(window))
        mx.eval(model.model(mx.array([window]), cache=caches))
        sparsity.append(measure_sparsity(caches, len(window)).prefill)
    return float(np.mean(sparsity))


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        (0.65, {}),
        (0.4, {"per": "head"}),
        (0.6, {"per": "model"}),
        (0.55, {"mode": "absolute"}),
    ],
    ids=str,
)
def test_unseen_text_has_the_wanted_sparsity(demo, wanted, options):
    """Recorded with dense attention, measured with the delta on."""
    model, tokenizer, seen, unseen = demo
    found = calibrate(
        model, tokenizer, seen, sparsity=wanted, length=LENGTH, windows=2, **options
    )
    assert found.sparsity == pytest.approx(wanted, abs=1e-3)
    assert prefill_sparsity(model, found.config, unseen) == pytest.approx(wanted, abs=0.02)


def test_a_wanted_loss_is_held_to_where_nothing_was_recorded(demo):
    model, tokenizer, seen, _ = demo
    found = calibrate(model, tokenizer, seen, loss=0.01, length=512, windows=3)
    assert found.loss is not None and found.loss.rise <= 0.01
    held_back = [seen[(2 * 10 // 3) * 512 :][:512]]  # the last of three windows of ten
    rise = mean_loss(model, held_back, found.config) - mean_loss(model, held_back, None)
    assert rise == pytest.approx(found.loss.rise, abs=1e-5)
    assert found.sparsity > 0.3
