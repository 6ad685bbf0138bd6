"""Prefill by tiles against the prompt's length: speed, density, and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mlx_delta.measure.prefill_file import Row, mean

from .theme import WIDTH, Theme, caption, headline, new_figure

HEIGHT, HEAD, FOOT = 3.75, 0.95, 0.95  # inches, of all, and above and below the panels
LEFT, GAP, RIGHT = 0.55, 0.62, 0.15
MARKERS = "osD^v"
TOKENS = tuple(1 << n for n in range(8, 21))  # lengths that are looked for


@dataclass(frozen=True)
class _Line:
    """What a panel shows of a model and a way."""

    model: str
    way: str
    label: str
    style: str
    value: Callable[[int], float | None]  # of so many tokens


def draw_prefill(rows: Sequence[Row], theme: Theme) -> Figure:
    """The picture: a panel each for speed, density and KL divergence.

    Args:
        rows: As :func:`mlx_delta.measure.prefill_file.read_rows` gives them.
        theme: Colours.

    Raises:
        ValueError: Nothing was measured with tiles.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    ways = sorted({row.way for row in rows if row.way.startswith("tiles")})
    if not ways:
        raise ValueError("[draw_prefill] nothing was measured with tiles; measure some first.")
    figure = new_figure(HEIGHT)
    headline(
        figure,
        theme,
        "Prefill by tiles against the prompt's length",
        "A colour for each model, a marker for each share of the attention that is asked for.",
    )
    width = (WIDTH - LEFT - RIGHT - 2 * GAP) / 3
    panels = []
    for i, title in enumerate(
        ("Times as fast as stock mlx-lm", "Tiles computed, of all", "KL divergence from exact")
    ):
        left = (LEFT + i * (width + GAP)) / WIDTH
        axes = figure.add_axes(
            (left, FOOT / HEIGHT, width / WIDTH, (HEIGHT - HEAD - FOOT) / HEIGHT)
        )
        axes.set_title(title, weight="bold")
        panels.append(axes)
    lines = [_lines(rows, models, ways, kind) for kind in ("speed", "density", "kl")]
    for axes, own in zip(panels, lines, strict=True):
        _draw(axes, theme, own, models, ways)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1)
    panels[2].set_yscale("log")
    _legend(figure, theme, models, ways)
    dates = [row.values["date"] for row in rows if "date" in row.values]
    caption(figure, theme, f"examples/prefill_results.py, {max(dates, default='no date')}.")
    return figure


def _lines(rows: Sequence[Row], models: list[str], ways: list[str], kind: str) -> list[_Line]:
    found = []
    for model in models:
        own = [row for row in rows if row.model == model]
        if kind == "speed":
            for way in ("exact", *ways):
                style = ":" if way == "exact" else "-"
                found.append(_Line(model, way, "", style, _speed(own, way)))
        for way in ways if kind == "density" else ():
            found.append(_Line(model, way, "", "-", _density(own, way)))
        for way in ways if kind == "kl" else ():
            for name, style in (("after_kl", "-"), ("end_kl", "--")):
                found.append(_Line(model, way, name, style, _value(own, "loss", way, name)))
    return found


def _value(rows: Sequence[Row], part: str, way: str, name: str) -> Callable[[int], float | None]:
    return lambda tokens: mean(rows, part, tokens, way, name)


def _density(rows: Sequence[Row], way: str) -> Callable[[int], float | None]:
    def value(tokens: int) -> float | None:
        loss = mean(rows, "loss", tokens, way, "density")
        return mean(rows, "speed", tokens, way, "density") if loss is None else loss

    return value


def _speed(rows: Sequence[Row], way: str) -> Callable[[int], float | None]:
    def value(tokens: int) -> float | None:
        stock, own = (
            mean(rows, "speed", tokens, name, "processor_seconds") for name in ("stock", way)
        )
        return None if stock is None or own is None else stock / own

    return value


def _draw(axes: Axes, theme: Theme, lines: list[_Line], models: list[str], ways: list[str]) -> None:
    axes.grid(True)
    axes.set_xscale("log", base=2)
    seen: set[int] = set()
    for line in lines:
        points = [(n, y) for n in TOKENS if (y := line.value(n)) is not None]
        seen.update(n for n, _ in points)
        color = theme.accents[models.index(line.model) % len(theme.accents)]
        marker = MARKERS[ways.index(line.way) % len(MARKERS)] if line.way in ways else "."
        axes.plot(
            [n for n, _ in points], [y for _, y in points], line.style, color=color, lw=1.3,
            marker=marker, ms=4, gid=" ".join(filter(None, (line.model, line.way, line.label))),
        )  # fmt: skip
    ticks = sorted(seen)
    axes.set_xticks(ticks, [f"{n // 1024}K" for n in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("tokens of the prompt")


def _legend(figure: Figure, theme: Theme, models: list[str], ways: list[str]) -> None:
    """What colours, markers and strokes stand for, in a row under the panels."""
    x, y = 0.12 / WIDTH, 0.3 / HEIGHT
    parts = [
        (f"{model}   ", theme.accents[i % len(theme.accents)]) for i, model in enumerate(models)
    ]
    names = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}
    shares = ", ".join(
        f"{names[MARKERS[i % len(MARKERS)]]} {way.removeprefix('tiles:')}"
        for i, way in enumerate(ways)
    )
    parts.append((f"{shares}; dotted: exact. KL: solid after the prompt, dashed at its end.", ""))
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for text, color in parts:
        drawn = figure.text(x, y, text, fontsize=8, color=color or theme.ink)
        x += drawn.get_window_extent(renderer).width / (WIDTH * figure.dpi)
