"""Tasks of samples that are answered or not: what such a task is, and summing it up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.nn as nn
import numpy as np

from mlx_delta.measure.settings import Setting
from mlx_delta.measure.stats import mean, wilson

from .rows import Cost

CHECK_EVERY = 25  # of samples that can't differ from dense, one in so many is measured all the same


class SampleTask(Protocol):
    """A task: numbered samples, and measuring some of them with one setting.

    Attributes:
        name: Names its results.
        options: What samples depend on, as JSON values; results with other options are others.
        groups: Numbers of samples that are measured together.
    """

    name: str
    options: dict[str, Any]
    groups: list[list[int]]

    def tokens(self, index: int) -> int:
        """The most tokens that a sample can come to."""
        ...

    def measure(self, model: nn.Module, setting: Setting, group: list[int]) -> list[dict[str, Any]]:
        """A record for each sample of a group: ``index``, ``score`` and caches' figures.

        Args:
            model: The model.
            setting: How keys and values are kept.
            group: Numbers of samples.
        """
        ...


def figures(cost: Cost) -> dict[str, Any]:
    """A text's cost as records have it."""
    return {
        **{f"{name}_sparsity": cost[name] for name in ("prefill", "decode", "overall")},
        "cache_bytes": cost["bytes"],
    }


def copied(record: dict[str, Any]) -> dict[str, Any]:
    """Dense attention's record as that of a setting that does not differ on so short a text."""
    return {**record, "as_dense": True}


def fitting_lengths(
    name: str, given: Sequence[int] | None, default: Sequence[int], context: int | None
) -> tuple[int, ...]:
    """Lengths of texts, ascending: those given, or the default ones that a model's context holds.

    Raises:
        ValueError: One is not positive, given twice or longer than the context.
    """
    if given is None:
        found = tuple(n for n in default if context is None or n <= context)
        return found or (int(context or 0),)
    if min(given, default=0) < 1 or len(set(given)) < len(given):
        raise ValueError(
            f"[{name}] lengths must be positive and differ but got {' '.join(map(str, given))}."
        )
    if context is not None and max(given) > context:
        raise ValueError(
            f"[{name}] a text of {max(given)} tokens is longer than the model's context of "
            f"{context}; give shorter --lengths."
        )
    return tuple(sorted(given))


def summarize(records: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The mean score with its 95 % interval, and the means of the caches' figures."""
    scores = [float(record["score"]) for record in records]
    if all(score in (0.0, 1.0) for score in scores):
        low, high = wilson(round(sum(scores)), len(scores))
        score = sum(scores) / len(scores)
    else:
        score, low, high = mean(scores)
    return {
        "metric": metric,
        "higher_is_better": True,
        "score": score,
        "low": low,
        "high": high,
        "samples": len(records),
        "metrics": {"as_dense": sum(bool(record.get("as_dense")) for record in records)},
        **mean_cost(records),
    }


def summarize_answers(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """F1 of answers, over all questions and over those that have an answer, or have none."""
    summary = summarize(records, "f1")
    for name, answerable in (("answerable", True), ("unanswerable", False)):
        scores = [r["score"] for r in records if r.get("answerable") is answerable]
        if scores:
            summary["metrics"][name] = sum(scores) / len(scores)
    return summary


def mean_cost(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sparsities and bytes averaged over records; a sparsity over those that have it."""
    found: dict[str, Any] = {}
    for name in ("prefill_sparsity", "decode_sparsity", "overall_sparsity"):
        values = [record[name] for record in records if record[name] is not None]
        found[name] = float(np.mean(values)) if values else None
    found["cache_bytes"] = round(float(np.mean([record["cache_bytes"] for record in records])))
    return found
