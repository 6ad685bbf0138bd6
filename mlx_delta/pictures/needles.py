"""Needles found by length and depth, a grid for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .theme import WIDTH, Theme, caption, headline, new_figure, readable

COLUMNS = 3  # grids side by side
# Inches: a row of a grid; left of a grid; above all and below, above each grid and below.
CELL, LEFT, HEAD, FOOT, TITLE, AXIS = 0.26, 0.55, 0.55, 0.3, 0.33, 0.42


@dataclass(frozen=True)
class NeedleGrid:
    """What one setting found.

    Attributes:
        name: Of the setting.
        lengths: Tokens of texts, ascending.
        depths: As they are written, ascending.
        found: [depths, lengths].
        asked: [depths, lengths]; 0 where nothing was asked.
    """

    name: str
    lengths: tuple[int, ...]
    depths: tuple[str, ...]
    found: np.ndarray
    asked: np.ndarray


def make_grid(name: str, metrics: dict[str, float]) -> NeedleGrid:
    """A setting's grid, from its summary's metrics.

    Raises:
        ValueError: They are not those of needles.
    """
    cells = {
        tuple(key.removeprefix("asked@").split(":")): int(count)
        for key, count in metrics.items()
        if key.startswith("asked@")
    }
    if not cells:
        raise ValueError(f"[make_grid] the results of {name!r} have no needles.")
    lengths = sorted({int(length) for length, _ in cells})
    depths = sorted({depth for _, depth in cells}, key=float)
    found, asked = np.zeros((2, len(depths), len(lengths)), int)
    for (length, depth), count in cells.items():
        at = depths.index(depth), lengths.index(int(length))
        asked[at] = count
        found[at] = int(metrics[f"found@{length}:{depth}"])
    return NeedleGrid(name, tuple(lengths), tuple(depths), found, asked)


def draw_needles(grids: Sequence[NeedleGrid], theme: Theme, title: str, source: str) -> Figure:
    """The picture: lengths across, depths down, and in each cell how many were found.

    Args:
        grids: Of one model; the first of dense attention.
        theme: Colours.
        title: What the picture shows.
        source: Where the numbers come from.
    """
    columns = min(COLUMNS, len(grids))
    rows = -(-len(grids) // columns)
    # Settings that were asked for less have the cells of dense attention all the same.
    lengths = tuple(sorted({length for grid in grids for length in grid.lengths}))
    depths = tuple(sorted({depth for grid in grids for depth in grid.depths}, key=float))
    size = CELL * len(depths)
    height = HEAD + rows * (TITLE + size + AXIS) + FOOT
    figure = new_figure(height)
    headline(figure, theme, title, "Needles found of those asked.")
    width = (WIDTH - 0.1) / columns - LEFT
    for i, grid in enumerate(grids):
        row, column = divmod(i, columns)
        left = LEFT + column * (LEFT + width)
        bottom = height - HEAD - (row + 1) * (TITLE + size) - row * AXIS
        axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, size / height))
        _draw_grid(axes, theme, grid, lengths, depths)
    caption(figure, theme, source)
    return figure


def _draw_grid(
    axes: Axes, theme: Theme, grid: NeedleGrid, lengths: tuple[int, ...], depths: tuple[str, ...]
) -> None:
    found, asked = np.zeros((2, len(depths), len(lengths)), int)
    rows = [depths.index(depth) for depth in grid.depths]
    across = [lengths.index(length) for length in grid.lengths]
    found[np.ix_(rows, across)], asked[np.ix_(rows, across)] = grid.found, grid.asked
    shares = np.ma.masked_where(asked == 0, found / np.maximum(asked, 1))
    norm = Normalize(0, 1)
    axes.set_facecolor(theme.grid)
    axes.pcolormesh(shares, cmap=theme.colormap, norm=norm, edgecolors=theme.background, lw=1.5)
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(len(depths), 0)
    total = f"{found.sum()} of {asked.sum()}"
    axes.set_title(f"{grid.name}: {total}", weight="bold", pad=4)
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [f"{length:,}" for length in lengths])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{float(d):.0%}" for d in depths])
    axes.set_xlabel("tokens", labelpad=1)
    axes.set_ylabel("depth")
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    for y, x in np.ndindex(found.shape):
        text, color = "–", theme.quiet
        if asked[y, x]:
            share = found[y, x] / asked[y, x]
            text, color = (
                f"{found[y, x]}/{asked[y, x]}",
                readable(theme, theme.colormap(norm(share))),
            )
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=color)
