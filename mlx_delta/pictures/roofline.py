"""How fast chips could decode at most, against the context: computed, not measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import names
from .theme import WIDTH, Theme, caption, headline, new_figure

ACROSS = 4  # panels in a row
PANEL = 2.7  # inches of a panel's height
# Inches: left of a row and between panels, room for labels at its right, above all, below each.
LEFT, GAP, RIGHT, HEAD, BELOW = 0.72, 0.18, 1.55, 1.12, 0.95
SMALL_MODEL = 64e6  # bytes of weights that a chip's own cache may hold


@dataclass(frozen=True)
class Roofline:
    """Decode ceilings of a model.

    Attributes:
        model: Its name.
        delta: The model's own setting, as in a config.json.
        date: YYYY-MM-DD.
        rows: As ``python -m mlx_delta.benchmark --roofline`` writes them: ``setting``,
            ``context``, ``extrapolated``, ``weight_bytes``, ``bytes`` and ``ceilings``, in tokens
            per second by chip.
    """

    model: str
    delta: dict[str, Any]
    date: str
    rows: Sequence[dict[str, Any]]

    @property
    def chips(self) -> list[str]:
        """All chips, in order."""
        return list(self.rows[0]["ceilings"])

    @property
    def settings(self) -> list[str]:
        """All settings, in order."""
        return list(dict.fromkeys(row["setting"] for row in self.rows))

    def line(self, setting: str, chip: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Contexts, tokens per second, and which of them are extrapolated."""
        rows = [row for row in self.rows if row["setting"] == setting]
        return (
            np.array([row["context"] for row in rows]),
            np.array([row["ceilings"][chip] for row in rows]),
            np.array([row["extrapolated"] for row in rows], bool),
        )


def read_roofline(path: str | Path) -> Roofline:
    """A file that ``python -m mlx_delta.benchmark --roofline CHIP --output FILE`` wrote.

    Raises:
        OSError: It can't be read.
        ValueError: It is another file.
    """
    how = "give a file that mlx_delta.benchmark --roofline wrote"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or "it can't be read").lower()
        raise OSError(f"[read_roofline] {path}: {reason}; {how}.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"[read_roofline] {path} is not JSON: {error}; {how}.") from error
    if not isinstance(data, dict) or data.get("kind") != "roofline" or not data.get("results"):
        kind = data.get("kind") if isinstance(data, dict) else None
        found = f"has {kind} results" if kind else "is not a results file"
        raise ValueError(f"[read_roofline] {path} {found}; {how}.")
    try:
        roofline = Roofline(
            data["model"]["name"], data.get("delta") or {}, data["date"][:10], data["results"]
        )
        for chip in roofline.chips:
            for setting in roofline.settings:
                roofline.line(setting, chip)
        return roofline
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"[read_roofline] {path} is not whole: it lacks {error}.") from error


def draw_roofline(roofline: Roofline, theme: Theme) -> Figure:
    """The picture: a panel for each chip, a line for each setting."""
    chips = roofline.chips
    across = min(len(chips), ACROSS)
    down = -(-len(chips) // across)
    height = HEAD + down * (PANEL + BELOW) - 0.08
    figure = new_figure(height)
    headline(
        figure,
        theme,
        f"Decode ceiling by chip: {roofline.model} (computed, not measured)",
        "Memory bandwidth / bytes read per token: weights and cache. In practice 70 to 85 % of it.",
        names.KEY,
    )
    speeds = [speed for row in roofline.rows for speed in row["ceilings"].values()]
    width = (WIDTH - LEFT - RIGHT - (across - 1) * GAP) / across
    for i, chip in enumerate(chips):
        row, column = divmod(i, across)
        left = LEFT + column * (width + GAP)
        bottom = height - HEAD - row * (PANEL + BELOW) - PANEL
        axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, PANEL / height))
        axes.set_yscale("log")
        axes.set_ylim(min(speeds) / 1.25, max(speeds) * 1.25)
        _draw_chip(axes, theme, roofline, chip)
        if column:
            axes.tick_params(labelleft=False, which="both")
        else:
            axes.set_ylabel("tokens per second, at most")
        if column == across - 1 or i == len(chips) - 1:
            _name_lines(axes, theme, roofline, chip)
    caption(figure, theme, "\n".join(_notes(roofline)))
    return figure


def _draw_chip(axes: Axes, theme: Theme, roofline: Roofline, chip: str) -> None:
    axes.grid(True)
    axes.set_xscale("log", base=2)
    for setting in roofline.settings:
        contexts, speeds, extrapolated = roofline.line(setting, chip)
        family = names.family(setting, roofline.delta)
        color = names.color(theme, family)
        known = int((~extrapolated).sum())
        axes.plot(contexts[:known], speeds[:known], color=color, lw=1.3)
        axes.plot(contexts[max(0, known - 1) :], speeds[max(0, known - 1) :], color=color, lw=1.3,
                  ls=(0, (3, 2)))  # fmt: skip
        axes.plot(
            contexts, speeds, names.marker(family), ms=4.5, color=color, mec=theme.background,
            mew=0.5, ls="none", gid=f"{chip}: {setting}", zorder=4,
        )  # fmt: skip
    bytes_per_token = roofline.rows[0]["bytes"]
    bandwidth = roofline.rows[0]["ceilings"][chip] * bytes_per_token / 1e9
    name, _, variant = chip.removesuffix(")").partition(" (")
    axes.set_title(name, weight="bold", pad=15)
    details = f"{variant + ', ' if variant else ''}{bandwidth:.0f} GB/s"
    axes.text(0, 1.02, details, transform=axes.transAxes, fontsize=7.5, color=theme.quiet)
    ticks = sorted({row["context"] for row in roofline.rows})
    step = 2 if len(ticks) > 4 and len(roofline.chips) > 2 else 1
    axes.set_xticks(ticks[::-step], [_short(tick) for tick in ticks[::-step]])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name_lines(axes: Axes, theme: Theme, roofline: Roofline, chip: str) -> None:
    """Write each setting's name at the right end of its line, apart from each other."""
    ends = []
    dense = None
    for setting in roofline.settings:
        contexts, speeds, _ = roofline.line(setting, chip)
        ends.append((float(speeds[-1]), float(contexts[-1]), setting))
        dense = float(speeds[-1]) if setting == "dense" else dense
    scale = axes.get_figure().dpi / 72
    ends.sort()
    wanted = [float(axes.transData.transform((x, y))[1]) for y, x, _ in ends]
    for (speed, context, setting), place in zip(ends, spread(wanted, 11 * scale), strict=True):
        color = names.color(theme, names.family(setting, roofline.delta))
        gain = f" ×{speed / dense:.2f}" if dense and setting != "dense" else ""
        x, y = axes.transData.transform((context, speed))
        axes.annotate(
            names.label(setting, roofline.delta) + gain,
            (context, speed),
            (14, (place - y) / scale),
            textcoords="offset points",
            color=color,
            fontsize=7.5,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": color, "shrinkA": 0, "shrinkB": 3},
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], least: float) -> list[float]:
    """Places near the ascending wanted ones, at least so far from each other.

    Neighbours that are too close form a group around the mean of what they want.
    """
    groups: list[list[float]] = []
    for place in wanted:
        groups.append([place])
        while (
            len(groups) > 1 and _group(groups[-2], least)[-1] + least > _group(groups[-1], least)[0]
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [place for group in groups for place in _group(group, least)]


def _group(wanted: Sequence[float], least: float) -> list[float]:
    middle, n = sum(wanted) / len(wanted), len(wanted)
    return [middle + (i - (n - 1) / 2) * least for i in range(n)]


def _notes(roofline: Roofline) -> list[str]:
    known = max((r["context"] for r in roofline.rows if not r["extrapolated"]), default=0)
    first = f"mlx_delta.benchmark, {roofline.date}."
    if any(row["extrapolated"] for row in roofline.rows):
        first += (
            f" Dashed: bytes extrapolated from caches filled to {known:,} tokens."
            if known
            else (" Dashed: bytes extrapolated from shorter contexts.")
        )
    if "dense" in roofline.settings:
        first += " ×: of dense, at the longest context."
    weights = roofline.rows[0]["weight_bytes"]
    if weights > SMALL_MODEL:
        return [first]
    return [
        first,
        f"A model of {weights / 1e6:.0f} MB stays in a chip's own cache and waits for launches: "
        "its ceiling says nothing about its speed.",
    ]


def _short(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else str(context)
