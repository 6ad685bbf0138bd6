"""Texts whose end has to be recalled, and what they add to sensitivities."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_delta import load
from mlx_delta.calibrate.recall import QUOTED, Recall, make_recall
from mlx_delta.calibrate.weights import RECALLED, measure_recall, measure_weights, watch
from mlx_delta.config import DeltaConfig
from mlx_delta.measure.text import BUNDLED_TEXT, encode_text, read_text
from tests.tiny import llama_model, tokens

SMALL_RUNS = DeltaConfig(block_size=8, window=16, sinks=3, level=0.1)


@pytest.fixture(scope="module")
def tokenizer():
    return load("demo", lazy=True)[1]


@pytest.fixture(scope="module")
def prose(tokenizer) -> list[int]:
    return encode_text(tokenizer, read_text(BUNDLED_TEXT)[:20_000])


@pytest.mark.parametrize("length", [200, 512, 1024, 1777])
def test_what_is_asked_was_told_far_before(tokenizer, prose, length):
    found = make_recall(tokenizer, prose, length, seed=1)
    assert length - QUOTED - 8 < len(found.ids) <= length
    assert 0.6 * length < found.told < length
    told = tokenizer.decode(found.ids[: found.told])
    assert min(found.asked) >= found.told and max(found.asked) < len(found.ids) - 1
    asked = set(found.asked)
    answers, quoted = 0, 0
    for first in sorted(p for p in asked if p - 1 not in asked):
        end = first + 1
        while end in asked:
            end += 1
        begun = tokenizer.decode(found.ids[found.told : first + 1])
        answer = tokenizer.decode(found.ids[first + 1 : end + 1])
        if begun.endswith(" is") and "The code of the" in begun.rpartition("\n\n")[2]:
            thing = begun.rpartition("The code of the ")[2].removesuffix(" is")
            assert f"the code of the {thing} is {answer.strip()}." in told
            answers += 1
        else:
            assert answer in told
            quoted += 1
    assert answers == told.count("Please remember") and quoted >= 1
    assert answers == 8 or length < 1024


def test_seeds_ask_other_things(tokenizer, prose):
    one, same, other = (make_recall(tokenizer, prose, 600, seed) for seed in (1, 1, 2))
    assert one == same and one.ids != other.ids


def test_recall_adds_its_share_to_the_weights(tokenizer, prose):
    """In units of prose: all that is recalled weighs as much as all that prose needs."""
    model, window = llama_model(SMALL_RUNS), tokens(120)[0].tolist()
    watched = watch(model, window, SMALL_RUNS)
    weights = measure_weights(model, window, SMALL_RUNS, watched, "gradients").weights
    ids = tokens(110, seed=3)[0].tolist()
    found = measure_recall(model, Recall(ids, [90, 91, 105], told=80), SMALL_RUNS, weights)
    total = [sum(float(x.sum()) for x in each) for each in (weights, found.weights)]
    assert total[1] == pytest.approx(total[0], rel=1e-4)
    for i, mixed in enumerate(found.mixed(weights)):
        assert found.squares[i].shape[:2] == (2, 64 + 16 + 1)  # keys far from all that is asked
        wanted = (1 - RECALLED) * weights[i] + RECALLED * found.weights[i]
        np.testing.assert_allclose(mixed, wanted, rtol=1e-5)
    # A token that nothing is asked after has no say.
    again = measure_recall(model, Recall([*ids, 7, 8], [90, 91, 105], 80), SMALL_RUNS, weights)
    for one, other in zip(found.weights, again.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)
