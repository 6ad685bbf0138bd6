"""Every setting, every way back: the logits of an undisturbed run, and the fact recalled."""

from __future__ import annotations

import pytest

from .invariant import SETTINGS, WAYS, run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_answer_is_that_of_an_undisturbed_run(setting, way):
    outcome = run(setting).outcome(way)
    assert outcome.holds, outcome
