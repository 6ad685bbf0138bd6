"""Calibrating the bundled demo model: what was asked for is what unseen text gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, load, measure_sparsity
from mlx_delta import calibrate as package
from mlx_delta.calibrate import calibrate, sensitivity
from mlx_delta.evaluate.language import measure_window
from mlx_delta.measure.settings import Setting
from mlx_delta.measure.text import BUNDLED_TEXT, encode_text, read_text

LENGTH = 1024


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, list[int], list[list[int]]]:
    """The model, its tokenizer, the beginning of a book, and a window of its rest."""
    model, tokenizer = load("demo", DeltaConfig(threshold=1.0))
    ids = encode_text(tokenizer, read_text(BUNDLED_TEXT))
    seen, rest = ids[: 5 * LENGTH], ids[7 * LENGTH :]
    return model, tokenizer, seen, [rest[3 * LENGTH : 4 * LENGTH]]


@pytest.fixture(scope="module", autouse=True)
def recorded_once() -> Iterator[None]:
    """What is recorded does not depend on the wish: it need not be recorded for each."""
    known: dict[tuple, Any] = {}
    record = package.record

    def remember(model: Any, windows: list[list[int]], config: DeltaConfig, *args: Any) -> Any:
        key = (config.threshold_mode, str(windows))
        known[key] = known.get(key) or record(model, windows, config, *args)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "record", remember)
        yield


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
        (0.65, {"cost": "attention"}),
        (0.4, {"cost": "attention", "per": "head"}),
        (0.55, {"cost": "attention", "mode": "absolute"}),
    ],
    ids=str,
)
def test_unseen_text_has_the_wanted_sparsity(demo, wanted, options):
    """Recorded with dense attention, measured with the delta on."""
    model, tokenizer, seen, unseen = demo
    found = calibrate(model, tokenizer, seen, sparsity=wanted, length=LENGTH, windows=1, **options)
    assert found.sparsity == pytest.approx(wanted, abs=1e-3)
    assert prefill_sparsity(model, found.config, unseen) == pytest.approx(wanted, abs=0.02)


def test_measured_divergences_hit_it_too_and_their_sum_foretells_that_of_all(demo, monkeypatch):
    """Predicted from single layers, measured with all of them held."""
    monkeypatch.setattr(sensitivity, "GRID", (0.5, 1.5, 8.0))
    model, tokenizer, seen, unseen = demo
    window = seen[: LENGTH // 2]
    found = calibrate(model, tokenizer, window, sparsity=0.5, length=LENGTH // 2, windows=1)
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    halves = [unseen[0][: LENGTH // 2], unseen[0][LENGTH // 2 :]]
    assert prefill_sparsity(model, found.config, halves) == pytest.approx(0.5, abs=0.02)
    assert found.divergence is not None
    uniform = DeltaConfig(threshold=found.curve.threshold_for(0.5))
    settings = [Setting("delta", "delta", config) for config in (found.config, uniform)]
    window = seen[: LENGTH // 2 + 1]  # its last token is only predicted
    chosen, one = (r["kld"] for r in measure_window(model, tokenizer, window, settings))
    assert chosen == pytest.approx(found.divergence.chosen, rel=0.3)
    assert one == pytest.approx(found.divergence.uniform, rel=0.3)
    assert chosen < one
