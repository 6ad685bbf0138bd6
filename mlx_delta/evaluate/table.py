"""A results file as tables, one per task, for the terminal or in Markdown.

Figures are the same on every run: no times are in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mlx_delta.measure.stats import mean, ratio
from mlx_delta.measure.table import Table, format_bytes

# Kinds of settings whose keys can be skipped; for others a sparsity of 0 would be no finding.
_SPARSE = ("delta", "paper", "window-only")
_DIGITS = {"bits_per_byte": 4, "kld": 5}
# Nats by which each token of an answer must lead for a needle to be found clearly: a tenth likelier
# than any other token.
CLEAR = math.log(1.1)
_NAMES = {"bits_per_byte": "bits per byte", "kld": "KL divergence"}


def render(data: dict[str, Any], markdown: bool = False) -> str:
    """All tables of a results file; an empty string if nothing was measured yet."""
    tables = make_tables(data)
    return "\n\n".join(table.markdown() if markdown else table.text() for table in tables)


def make_tables(data: dict[str, Any]) -> list[Table]:
    """One table for each task of a results file, in the order in which they were begun."""
    runs = [run for run in data["runs"] if run["summary"]]
    return [
        _table(data["model"]["name"], [run for run in runs if run["task"] == task])
        for task in dict.fromkeys(run["task"] for run in runs)
    ]


def _table(model: str, runs: Sequence[dict[str, Any]]) -> Table:
    summary = runs[0]["summary"]
    metric = summary["metric"]
    digits = _DIGITS.get(metric, 3)
    dense = next((run for run in runs if run["kind"] == "dense"), None)
    distances = [name for name in summary["metrics"] if name.startswith("accuracy@")]
    header = ["setting", _NAMES.get(metric, metric.replace("_", " "))]
    if metric != "kld":
        header.append("of dense's" if metric == "found" else "vs dense")
    header += [name[len("accuracy") :] for name in distances]
    header += {"bits_per_byte": ["perplexity"], "kld": ["top-1"]}.get(metric, [])
    header += ["99 %", "largest"] if runs[0]["task"] == "fidelity" else []
    lengths = [name for name in summary["metrics"] if name.startswith("share@")]
    header += [name[len("share") :] for name in lengths]
    kinds = [name for name in ("answerable", "unanswerable") if name in summary["metrics"]]
    header += [*kinds, "prefill", "decode", "overall", "cache", "of dense"]
    rows = []
    for run in runs:
        summary = run["summary"]
        metrics = summary["metrics"]
        row = [run["setting"], _with_error(summary, digits)]
        if metric == "found":
            row[1] = f"{metrics['found']} of {metrics['asked']}"
        if len(run["records"]) < run["planned"] and run["records"]:
            row[0] += f" ({len(run['records'])} of {run['planned']})"
        if metric != "kld":
            row.append(_difference(run, dense, digits))
        for name in distances:
            row.append(
                _interval(
                    metrics[name],
                    *(metrics[name.replace("accuracy", end)] for end in ("low", "high")),
                )
            )
        if metric == "bits_per_byte":
            row.append(f"{metrics['perplexity']:.3f}")
        elif metric == "kld":
            row.append(f"{metrics['top1']:.4f}")
        if run["task"] == "fidelity":
            row += [f"{metrics['kld_p99']:.4f}", f"{metrics['kld_max']:.3f}"]
        row += [f"{metrics[name]:.3f}" for name in (*lengths, *kinds)]
        for name in ("prefill", "decode", "overall"):
            value = summary[f"{name}_sparsity"]
            row.append("–" if value is None or run["kind"] not in _SPARSE else f"{value:.3f}")
        row.append(format_bytes(summary["cache_bytes"]))
        share = summary["cache_bytes"] / dense["summary"]["cache_bytes"] if dense else None
        row.append("–" if share is None else f"{share:.3f}")
        rows.append(row)
    return Table(_caption(model, runs), header, rows)


def _interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """A value and its interval; of an uneven one the wider side."""
    return f"{value:.{digits}f} ±{max(high - value, value - low):.{digits}f}"


def _with_error(summary: dict[str, Any], digits: int) -> str:
    """A score and its interval; a single sample has none, nor have some metrics."""
    if summary["low"] == summary["high"]:
        return f"{summary['score']:.{digits}f}"
    return _interval(summary["score"], summary["low"], summary["high"], digits)


def _difference(run: dict[str, Any], dense: dict[str, Any] | None, digits: int) -> str:
    """The difference to dense; over the samples both have, with its interval."""
    if dense is None or run is dense:
        return "–"
    if run["task"] == "needles":
        return _kept(run, dense)
    records = {_number(record): record for record in dense["records"]}
    pairs = [(r, records[_number(r)]) for r in run["records"] if _number(r) in records]
    if not pairs:
        value = low = high = run["summary"]["score"] - dense["summary"]["score"]
    elif run["task"] == "recall":
        value, low, high = mean([_share(a) - _share(b) for a, b in pairs])
    elif "score" in pairs[0][0]:
        value, low, high = mean([a["score"] - b["score"] for a, b in pairs])
    else:
        bits = [(a["nats"] - b["nats"]) / math.log(2) for a, b in pairs]
        value, low, high = ratio(bits, [a["bytes"] for a, _ in pairs])
    text = f"{round(value, digits) + 0.0:+.{digits}f}"  # never -0
    # Where all samples differ alike, these samples can't say how others would.
    return text if low == high else f"{text} ±{(high - low) / 2:.{digits}f}"


def _number(record: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a task's samples apart."""
    return record.get("template"), record["index"]


def _kept(run: dict[str, Any], dense: dict[str, Any]) -> str:
    """The needles found of those that dense attention finds, and what their answers lose.

    Those that it finds clearly are counted once more: the others are ties, which any other
    rounding may turn either way.
    """
    found = {record["index"]: record["right"] for record in dense["records"]}
    margins = {record["index"]: record.get("margins", {}) for record in dense["records"]}
    pairs = [
        (right, margins[record["index"]].get(depth))
        for record in run["records"]
        for depth, right in record["right"].items()
        if found.get(record["index"], {}).get(depth)
    ]
    if not pairs:
        return "–"
    kept = [right for right, _ in pairs]
    counts = f"{sum(kept)} of {len(kept)}"
    if all(margin is not None for _, margin in pairs):
        clear = [right for right, margin in pairs if margin >= CLEAR]
        counts += f"; clear ones {sum(clear)} of {len(clear)}"
    text = f"{sum(kept) / len(kept):.3f} ({counts})"
    before = {record["index"]: record.get("nats", {}) for record in dense["records"]}
    lost = [
        nats - before[record["index"]][depth]
        for record in run["records"]
        for depth, nats in record.get("nats", {}).items()
        if found[record["index"]].get(depth) and depth in before[record["index"]]
    ]
    if not lost:
        return text
    value, low, high = mean(lost)
    return f"{text}, {value:+.3f} ±{(high - low) / 2:.3f} nats"


def _share(record: dict[str, Any]) -> float:
    """Of a recall sample's answers, those that were right."""
    return float(sum(record["right"].values()) / len(record["right"]))


def _caption(model: str, runs: Sequence[dict[str, Any]]) -> str:
    task, options = runs[0]["task"], runs[0]["options"]
    samples = max(run["summary"]["samples"] for run in runs)
    if task == "recall":
        what = (
            f"{samples * len(options['distances'])} answers, asked by "
            f"{' and '.join(options['templates'])} in {samples} samples of {options['length']} "
            f"tokens with {options['facts']} facts each, seed {options['seed']}"
        )
    elif task in ("perplexity", "kld", "fidelity"):
        what = f"{samples} windows of {options['length']} tokens, the second half scored" + (
            ", against the same model with a dense cache" if task != "perplexity" else ""
        )
    elif task == "needles":
        what = (
            f"{samples} texts of {_listed(options['lengths'])} tokens with needles at depths "
            f"{_listed(options['depths'])}, {'in a chat' if options['chat'] else 'no chat'}, "
            f"seed {options['seed']}"
        )
    elif task.startswith("ruler-"):
        what = (
            f"{samples} texts of {_listed(options['lengths'])} tokens, "
            f"{'in a chat' if options['chat'] else 'no chat'}, seed {options['seed']}"
        )
    elif "file" in options:
        what = f"{samples} samples of {options['file']}"
    else:
        what = f"{samples} samples"
        if options.get("num_shots") is not None:
            what += f", {options['num_shots']} shots"
    text = f", {options['text']}" if "text" in options else ""
    return f"{task}, {model}: {what}{text}"


def _listed(values: Sequence[Any]) -> str:
    """Values in words."""
    *some, last = map(str, values)
    return f"{', '.join(some)} and {last}" if some else last
