"""SQuAD v2's metrics, by the definitions of its paper (Rajpurkar et al., arXiv 1806.03822).

lm-evaluation-harness takes them from a script that is downloaded at every run; these are the same
numbers without it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_DROPPED = re.compile(rf"[{re.escape(string.punctuation)}]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_v2(
    predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """All metrics, in percent.

    Args:
        predictions: Each with ``prediction_text`` and ``no_answer_probability``.
        references: Each with ``answers``, whose ``text`` is a list; empty: there is no answer.

    Returns:
        ``exact`` and ``f1`` over all questions, over those with an answer (``HasAns_``) and over
        those without (``NoAns_``), and ``best_exact`` and ``best_f1`` with the threshold of
        ``no_answer_probability``, above which a prediction is taken for none, that suits each best.
    """
    answerable = [bool(_golds(reference)) for reference in references]
    metrics: dict[str, float] = {}
    for name, scores in question_scores(predictions, references).items():
        metrics[name] = _percent(scores)
        for prefix, kind in (("HasAns", True), ("NoAns", False)):
            chosen = [s for s, has in zip(scores, answerable, strict=True) if has is kind]
            if chosen:
                metrics[f"{prefix}_{name}"] = _percent(chosen)
        best, threshold = _best(scores, answerable, predictions)
        metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return metrics


def question_scores(
    predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]
) -> dict[str, list[float]]:
    """``exact`` and ``f1`` of every question, from 0 to 1: those of its most fitting answer."""
    scores: dict[str, list[float]] = {"exact": [], "f1": []}
    for prediction, reference in zip(predictions, references, strict=True):
        given = _words(prediction["prediction_text"])
        golds = [_words(answer) for answer in _golds(reference)] or [[]]
        scores["exact"].append(max(float(given == gold) for gold in golds))
        scores["f1"].append(max(_f1(given, gold) for gold in golds))
    return scores


def _golds(reference: dict[str, Any]) -> list[str]:
    """The answers of a question that are more than articles and punctuation."""
    return [answer for answer in reference["answers"]["text"] if _words(answer)]


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return _ARTICLES.sub(" ", _DROPPED.sub("", text.lower())).split()


def _f1(given: list[str], gold: list[str]) -> float:
    """Harmonic mean of precision and recall of the words; equality where either has none."""
    if not given or not gold:
        return float(given == gold)
    shared = sum((Counter(given) & Counter(gold)).values())
    return 2 * shared / (len(given) + len(gold))


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)


def _best(
    scores: Sequence[float], answerable: Sequence[bool], predictions: Sequence[dict[str, Any]]
) -> tuple[float, float]:
    """The best score over thresholds of the no-answer probability, and the threshold.

    Questions are taken in the order of that probability: those up to the threshold keep their
    score, those above it count as answered by nothing.
    """
    current = best = float(sum(not has for has in answerable))
    threshold = 0.0
    order = sorted(range(len(scores)), key=lambda i: predictions[i]["no_answer_probability"])
    for i in order:
        if answerable[i]:
            current += scores[i]
        elif predictions[i]["prediction_text"]:
            current -= 1
        if current > best:
            best, threshold = current, predictions[i]["no_answer_probability"]
    return 100 * best / len(scores), threshold
