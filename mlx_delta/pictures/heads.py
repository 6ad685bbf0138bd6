"""Sparsity of each layer and kv head, as a heat map with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from .theme import WIDTH, Theme, caption, headline, new_figure, readable

LEAST_SPAN = 0.3  # of the colours, so that small differences look small

# Inches: a head's row; a layer's column at most, and with room for three digits.
CELL, WIDEST, ROOMY = 0.3, 1.6, 0.42
# Inches: left of a map and right of all, above all and below; above each map and below.
LEFT, BAR, HEAD, FOOT, TITLE, AXIS = 0.6, 0.9, 0.5, 0.27, 0.33, 0.45


@dataclass(frozen=True)
class HeadMap:
    """The sparsity of a model's heads under one setting.

    Attributes:
        name: Of the setting.
        values: [layers, kv heads], as fractions of 1.
    """

    name: str
    values: np.ndarray


def color_range(maps: Sequence[HeadMap]) -> tuple[float, float]:
    """Tenths around all values; some width even where they are alike."""
    low = math.floor(10 * min(float(m.values.min()) for m in maps) + 1e-9) / 10
    high = math.ceil(10 * max(float(m.values.max()) for m in maps) - 1e-9) / 10
    while high - low < LEAST_SPAN - 1e-9:
        low, high = (low - 0.1, high) if low > 1 - high and low > 0 else (low, high + 0.1)
    return max(0.0, low), min(1.0, high)


def draw_heads(
    maps: Sequence[HeadMap], theme: Theme, title: str, explanation: str, source: str
) -> Figure:
    """The picture: one map below another, layers across and kv heads down.

    Args:
        maps: Of one model.
        theme: Colours.
        title: What the picture shows.
        explanation: What a number means.
        source: Where the numbers come from.
    """
    layers, heads = maps[0].values.shape
    columns = _columns(len(maps), layers)
    rows = -(-len(maps) // columns)
    space = (WIDTH - BAR) / columns - LEFT
    width, size = min(space, WIDEST * layers), CELL * heads
    height = HEAD + rows * (TITLE + size + AXIS) + FOOT
    figure = new_figure(height)
    headline(figure, theme, title, explanation)
    norm = Normalize(*color_range(maps))
    for i, head_map in enumerate(maps):
        row, column = divmod(i, columns)
        left = LEFT + column * (LEFT + space)
        bottom = height - HEAD - (row + 1) * (TITLE + size) - row * AXIS
        axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, size / height))
        _draw_map(axes, theme, head_map, norm, width / layers)
    right = columns * (LEFT + space) - space + width
    low, high = FOOT + AXIS, height - HEAD - TITLE
    bar = figure.add_axes(
        ((right + 0.15) / WIDTH, low / height, 0.12 / WIDTH, (high - low) / height)
    )
    colorbar = figure.colorbar(ScalarMappable(norm, theme.colormap), cax=bar)
    colorbar.set_label("sparsity")
    colorbar.locator = MultipleLocator(0.1)
    colorbar.outline.set_visible(False)
    caption(figure, theme, source)
    return figure


def _columns(maps: int, layers: int) -> int:
    """Maps side by side, as many as leave room for three digits in a cell."""
    columns = 1
    while columns < maps and ((WIDTH - BAR) / (columns + 1) - LEFT) / layers >= ROOMY:
        columns += 1
    return columns


def _draw_map(
    axes: Axes, theme: Theme, head_map: HeadMap, norm: Normalize, cell_width: float
) -> None:
    layers, heads = head_map.values.shape
    axes.pcolormesh(
        head_map.values.T, cmap=theme.colormap, norm=norm, edgecolors=theme.background, lw=1.5
    )
    axes.invert_yaxis()
    axes.set_title(f"{head_map.name}: mean {head_map.values.mean():.3f}", weight="bold", pad=4)
    axes.set_ylabel("kv head")
    axes.set_xlabel("layer", labelpad=1)
    axes.set_yticks(np.arange(heads) + 0.5, [str(i) for i in range(heads)])
    step = max(1, round(0.2 / cell_width))
    axes.set_xticks(np.arange(0, layers, step) + 0.5, [str(i) for i in range(0, layers, step)])
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    digits, size = (3, 8.0) if cell_width > ROOMY - 1e-6 else (2, 6.5)
    for layer in range(layers):
        for head in range(heads):
            value = float(head_map.values[layer, head])
            text = f"{value:.{digits}f}"
            if cell_width < 0.25:  # 32 layers: there is room for two digits only
                text, size = text.removeprefix("0"), min(size, 30 * cell_width)
            axes.text(
                layer + 0.5, head + 0.5, text, ha="center", va="center", fontsize=size,
                color=readable(theme, theme.colormap(norm(value))),
            )  # fmt: skip
