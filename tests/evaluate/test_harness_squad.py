"""SQuAD v2's metrics against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_delta.evaluate.harness_squad import question_scores, squad_v2


def question(given: str, golds: list[str], none: float) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"prediction_text": given, "no_answer_probability": none},
        {"answers": {"text": golds, "answer_start": [0] * len(golds)}},
    )


@pytest.mark.parametrize(
    "given, golds, exact, f1",
    [
        ("The Old House!", ["an old house"], 1, 1),  # case, articles, punctuation
        ("old red house", ["old house"], 0, 0.8),  # 2 of 3 and 2 of 2
        ("house house", ["house"], 0, 2 / 3),  # a word counts as often as it is there
        ("garden", ["old house", "a garden wall"], 0, 2 / 3),  # the best answer counts
        ("garden", ["house"], 0, 0),
        ("", ["house"], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("unanswerable", [], 0, 0),
        ("", ["the", "..."], 1, 1),  # answers without words are none
    ],
)
def test_questions(given, golds, exact, f1):
    predictions, references = zip(question(given, golds, 0.5), strict=True)
    scores = question_scores(predictions, references)
    assert scores == {"exact": [exact], "f1": [pytest.approx(f1)]}


def test_all_metrics():
    predictions, references = zip(
        question("old house", ["old house"], 0.1),
        question("old red house", ["old house"], 0.3),
        question("something", [], 0.7),
        question("", [], 0.2),
        question("garden", ["house"], 0.9),
        strict=True,
    )
    found = squad_v2(predictions, references)
    assert found["exact"] == pytest.approx(100 * 2 / 5)
    assert found["f1"] == pytest.approx(100 * (1 + 0.8 + 1) / 5)
    assert found["HasAns_exact"] == pytest.approx(100 / 3)
    assert found["HasAns_f1"] == pytest.approx(100 * 1.8 / 3)
    assert found["NoAns_exact"] == found["NoAns_f1"] == 50
    # Taking those above 0.3 for unanswered makes "something" right.
    assert found["best_f1"] == pytest.approx(100 * (1 + 0.8 + 2) / 5)
    assert found["best_f1_thresh"] == 0.3
    # Exactly right stays the first alone, and the two without an answer.
    assert found["best_exact"] == pytest.approx(100 * 3 / 5)
    assert found["best_exact_thresh"] == 0.1


def test_without_unanswerable_questions():
    predictions, references = zip(question("house", ["house"], 0.9), strict=True)
    found = squad_v2(predictions, references)
    assert found["exact"] == found["HasAns_exact"] == found["best_exact"] == 100
    assert "NoAns_exact" not in found
