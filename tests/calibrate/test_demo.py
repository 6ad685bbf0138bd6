"""Calibrating the bundled demo model: what was asked for is what unseen text gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta import DeltaConfig, load, measure_sparsity
from mlx_delta import calibrate as package
from mlx_delta.calibrate import calibrate
from mlx_delta.evaluate.text import BUNDLED_TEXT, encode_text, read_text
from mlx_delta.settings import Setting

LENGTH = 1024


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, list[int], list[list[int]]]:
    """The model, its tokenizer, the beginning of a book, and a window of its rest."""
    model, tokenizer = load("demo", DeltaConfig())
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
        (0.65, {}),
        (0.4, {"per": "head"}),
        (0.55, {"mode": "absolute"}),
    ],
    ids=str,
)
def test_unseen_text_has_the_wanted_sparsity(demo, wanted, options):
    """Recorded with dense attention, measured with the delta on."""
    model, tokenizer, seen, unseen = demo
    found = calibrate(model, tokenizer, seen, sparsity=wanted, length=LENGTH, windows=1, **options)
    assert found.sparsity == pytest.approx(wanted, abs=1e-3)
    assert prefill_sparsity(model, found.config, unseen) == pytest.approx(wanted, abs=0.02)
