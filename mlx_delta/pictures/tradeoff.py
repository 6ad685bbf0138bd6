"""Score against sparsity, and against cache bytes, for every setting of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from . import names
from .labels import Box, Label, place_labels
from .results import Run
from .theme import WIDTH, Theme, caption, headline, new_figure

HOLDS_KEYS = ("dense", "delta", "deltas", "paper")  # those that sparsity says something of

METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy, normalized",
    "exact_match": "exact match",
    "bits_per_byte": "bits per byte",
    "kld": "KL divergence from dense, nats",
    "f1": "F1",
}
# A score axis spans at least this much, so that noise does not look like a difference.
LEAST_SHARE = 0.1
LEAST_RELATIVE = 0.05  # of dense, where scores are not shares of 1

# Inches: a row of panels, what its title and axis take, above the rows and below them.
ROW, TITLE, HEAD, FOOT = 2.5, 0.78, 0.68, 0.35


@dataclass(frozen=True)
class ScoreAxis:
    """The range of a panel's scores.

    Attributes:
        low: Lower end.
        high: Upper end.
        log: Whether it is logarithmic.
    """

    low: float
    high: float
    log: bool = False

    def clip(self, score: float) -> float:
        """Where a score is drawn: at the edge if it lies outside."""
        return min(max(score, self.low), self.high)

    def holds(self, score: float) -> bool:
        """Whether a score lies inside."""
        return self.low <= score <= self.high


def score_axis(runs: Sequence[Run]) -> ScoreAxis:
    """A range that shows differences and does not exaggerate them.

    Scores far from dense are drawn at the edge, with their number, unless most are: one lost
    memory must not flatten all else. KL divergence, which spans decades, is logarithmic.
    """
    if runs[0].metric == "kld":
        return _log_axis(runs)
    centre = next((run.score for run in runs if run.kind == "dense"), _median(runs))
    share = runs[0].higher_is_better and all(0 <= run.score <= 1 for run in runs)
    least = LEAST_SHARE if share else LEAST_RELATIVE * abs(centre)
    near = [run for run in runs if abs(run.score - centre) <= 2 * least]
    shown = near if 2 * len(near) > len(runs) else list(runs)
    low = min(min(run.interval[0], run.score) for run in shown)
    high = max(max(run.interval[1], run.score) for run in shown)
    middle, half = (low + high) / 2, max(high - low, least) / 2 * 1.16
    low, high = middle - half, middle + half
    if share and high > 1:  # nothing is above 1: give the room to what is below
        low, high = max(0.0, low - (high - 1)), 1 + 0.04 * (1 - low)
    if share and low < 0:  # nor below 0
        low, high = -0.03, high - low
    return ScoreAxis(low, high)


def _log_axis(runs: Sequence[Run]) -> ScoreAxis:
    positive = [run.score for run in runs if run.score > 0]
    if not positive:
        return ScoreAxis(1e-6, 1.0, log=True)
    low = min([v for run in runs for v in (*run.interval, run.score) if v > min(positive) / 10])
    high = max(max(run.interval[1], run.score) for run in runs)
    # A whole decade at least.
    return ScoreAxis(min(low / 1.6, high / 10), high * 1.6, log=True)


def _median(runs: Sequence[Run]) -> float:
    return sorted(run.score for run in runs)[len(runs) // 2]


def draw_tradeoff(
    runs: Sequence[Run], theme: Theme, sparsity: str = "prefill", against: str = "both"
) -> Figure:
    """The picture: a row for each model and task.

    Args:
        runs: From :func:`mlx_delta.pictures.results.read_runs`.
        theme: Colours.
        sparsity: ``prefill``, ``decode`` or ``overall``.
        against: ``sparsity``, ``bytes`` or ``both``.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.fingerprint, run.task), []).append(run)
    columns = ["sparsity", "bytes"] if against == "both" else [against]
    height = HEAD + len(groups) * (ROW + TITLE) + FOOT
    figure = new_figure(height)
    models = list(dict.fromkeys(run.model for run in runs))
    what = {"sparsity": "sparsity", "bytes": "cache size", "both": "sparsity and cache size"}
    top = headline(
        figure,
        theme,
        f"Quality against {what[against]}: {', '.join(models)}",
        f"Bars: 95 % intervals.  {names.KEY}",
    )
    _legend(figure, theme, runs, 1 - top / height)
    for row, group in enumerate(groups.values()):
        axis = score_axis(group)
        bottom = (FOOT + (len(groups) - 1 - row) * (ROW + TITLE) + 0.42) / height
        for column, kind in enumerate(columns):
            width = (WIDTH - 0.75 - 0.15 - 0.3 * (len(columns) - 1)) / len(columns)
            left = 0.75 + column * (width + 0.3)
            axes = figure.add_axes((left / WIDTH, bottom, width / WIDTH, ROW / height))
            if kind == "sparsity":
                _sparsity_panel(axes, theme, group, axis, sparsity)
            else:
                _bytes_panel(axes, theme, group, axis)
            if column:
                axes.tick_params(labelleft=False)
            else:
                _describe(axes, group)
    caption(figure, theme, _source(runs))
    return figure


def _sparsity_panel(
    axes: Axes, theme: Theme, runs: Sequence[Run], axis: ScoreAxis, sparsity: str
) -> None:
    shown = [run for run in runs if run.family in HOLDS_KEYS and sparsity in run.sparsity]
    # Another task's texts are skipped to another share: the same setting, another number.
    task = runs[0].task if len(runs[0].task) <= len("perplexity") else "task's"
    where = "over both stages" if sparsity == "overall" else f"in {sparsity} of the {task} texts"
    axes.set_xlabel(f"share of QKᵀ skipped {where} (more is better)")
    places = {run.setting: run.sparsity[sparsity] for run in shown}
    largest = max(places.values(), default=0.0)
    axes.set_xlim(-0.04 * max(largest, 0.5), max(largest, 0.5) * 1.17)
    _plot(axes, theme, shown, places, axis)


def _bytes_panel(axes: Axes, theme: Theme, runs: Sequence[Run], axis: ScoreAxis) -> None:
    shown = [run for run in runs if run.cache_bytes is not None]
    dense = next((run.cache_bytes for run in shown if run.kind == "dense"), None)
    unit = dense or 2**20
    places = {run.setting: (run.cache_bytes or 0) / unit for run in shown}
    name = "share of dense fp16" if dense else "MiB, floats in 16 bits"
    axes.set_xlabel(f"key-value cache, {name} (less is better)")
    largest = max(places.values(), default=1.0)
    axes.set_xlim(-0.02 * largest, 1.16 * largest)
    _plot(axes, theme, shown, places, axis)


def _describe(axes: Axes, runs: Sequence[Run]) -> None:
    """Name a row of panels and its scores."""
    run = runs[0]
    samples = sorted({run.samples for run in runs})
    count = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
    better = "higher" if run.higher_is_better else "lower"
    axes.set_title(
        f"{run.model}, {run.task}: {better} is better; {count} samples a setting", weight="bold"
    )
    axes.set_ylabel(METRICS.get(run.metric, run.metric.replace("_", " ")))


def _plot(
    axes: Axes, theme: Theme, runs: Sequence[Run], places: dict[str, float], axis: ScoreAxis
) -> None:
    """Points with their intervals and labels; lines along sweeps of the threshold."""
    axes.grid(True)
    if axis.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylim(axis.low, axis.high)
    left, bottom, right, _ = axes.get_window_extent().extents
    labels, obstacles = [], [((left, bottom - 2, right, bottom + 2), 20.0)]
    for run in runs:
        color = names.color(theme, run.family)
        x, y = places[run.setting], axis.clip(run.score)
        inside = axis.holds(run.score)
        if run.kind == "dense" and inside:
            axes.axhline(y, color=theme.quiet, lw=0.8, ls=(0, (4, 3)), zorder=1)
        if inside:
            low, high = (axis.clip(bound) for bound in run.interval)
            axes.errorbar(
                x, y, [[max(0, y - low)], [max(0, high - y)]],
                fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=0.6, zorder=2,
            )  # fmt: skip
            obstacles.append((_box(axes, x, low, high, 0), 0.2))
        axes.plot(
            x, y, names.marker(run.family), ms=6, color=color, mec=theme.background, mew=0.6,
            ls="none", clip_on=False, zorder=4, gid=run.setting,
        )  # fmt: skip
        obstacles.append((_box(axes, x, y, y, 5), 20.0))
        number = "" if inside else f" {run.score:.3g} {'↓' if run.score < axis.low else '↑'}"
        labels.append(Label(x, y, run.label + number, color))
    _sweeps(axes, theme, runs, places, axis)
    place_labels(axes, labels, obstacles)


def _sweeps(
    axes: Axes, theme: Theme, runs: Sequence[Run], places: dict[str, float], axis: ScoreAxis
) -> None:
    """Join settings that differ in nothing but the threshold, where that is one number."""
    sweeps: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        others = tuple(
            sorted(
                (k, v) for k, v in names.written_options(run.setting).items() if k != "threshold"
            )
        )
        if axis.holds(run.score) and run.kind in ("delta", "paper") and _threshold(run) is not None:
            sweeps.setdefault((run.kind, others), []).append(run)
    for sweep in sweeps.values():
        if len(sweep) > 1:
            line = sorted((_threshold(run), places[run.setting], run.score) for run in sweep)
            _, xs, ys = zip(*line, strict=True)
            color = names.color(theme, sweep[0].family)
            axes.plot(xs, ys, "-", color=color, lw=1.1, alpha=0.45, zorder=3)


def _threshold(run: Run) -> float | None:
    """The threshold of all layers; ``None`` where each has its own."""
    try:
        return float(names.option(run.setting, run.delta, "threshold"))
    except (TypeError, ValueError):
        return None


def _box(axes: Axes, x: float, low: float, high: float, margin: float) -> Box:
    """Pixels around a marker or an interval."""
    left, bottom = axes.transData.transform((x, low))
    right, top = axes.transData.transform((x, high))
    return (left - margin, bottom - margin, right + margin, top + margin)


def _legend(figure: Figure, theme: Theme, runs: Sequence[Run], top: float) -> None:
    present = {run.family for run in runs}
    handles = [
        Line2D([], [], marker=m, color=names.color(theme, f), ls="none", ms=6, label=text)
        for f, (m, _, text) in names.FAMILIES.items()
        if f in present
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, top),
        ncols=len(handles),
        handletextpad=0.0,
        columnspacing=0.9,
        borderaxespad=0.1,
        fontsize=8,
    )


def _source(runs: Sequence[Run]) -> str:
    """The caption's text: dates, and what each setting is counted on."""
    dates = sorted({run.date for run in runs if run.date})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "no date"
    return (
        f"mlx_delta.evaluate, {when}. Cache: bytes allocated, floats at 16 bits; settings that "
        "hold no keys are shown there only."
    )
