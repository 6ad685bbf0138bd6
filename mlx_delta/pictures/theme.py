"""Colours for light and dark pages, and writing a picture in both.

Every picture is drawn once for each theme and written as PNG and SVG, ``name-light.png`` and so
on, for a ``<picture>`` element with ``prefers-color-scheme``. The same data gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from mlx_delta.system.files import write_whole

WIDTH = 8.0  # inches
DPI = 150  # 1,200 pixels wide
SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page.

    Attributes:
        name: ``light`` or ``dark``; ends the files' names.
        background: The page.
        ink: Text and axes.
        quiet: Captions, and lines that stand behind the data.
        grid: Grid lines, and areas without data.
        ramp: Colours of a map from nothing to all; it starts near the background.
        accents: Colours told apart by people with any common colour blindness, on this
            background: blue, orange, purple, green, brown or yellow, grey, red, teal.
    """

    name: str
    background: str
    ink: str
    quiet: str
    grid: str
    ramp: tuple[str, ...]
    accents: tuple[str, ...]

    @property
    def colormap(self) -> LinearSegmentedColormap:
        """The ramp, in steps coarse enough for small files."""
        return LinearSegmentedColormap.from_list("ramp", list(self.ramp), N=32)

    def settings(self) -> dict[str, Any]:
        """matplotlib's settings, all of them: a user's own matplotlibrc changes nothing."""
        return {
            **matplotlib.rcParamsDefault,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
            "font.size": 8.5,
            "axes.titlesize": 9,
            "axes.labelsize": 8.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": self.quiet,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.facecolor": self.background,
            "axes.linewidth": 0.7,
            "axes.axisbelow": True,
            "figure.facecolor": self.background,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "text.color": self.ink,
            "xtick.color": self.quiet,
            "ytick.color": self.quiet,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "svg.fonttype": "none",
            "svg.hashsalt": "mlx_delta",
        }


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1f2328",
    quiet="#59636e",
    grid="#e4e8ec",
    ramp=("#f2f6fa", "#b5d3ea", "#5ba3d0", "#1a6bab", "#08306b"),
    accents=(
        "#0072b2",
        "#dd5f00",
        "#93308a",
        "#008a66",
        "#6b4e00",
        "#858d96",
        "#b3003c",
        "#005f73",
    ),
)
DARK = Theme(
    name="dark",
    background="#0d1117",
    ink="#f0f3f6",
    quiet="#9198a1",
    grid="#262c34",
    ramp=("#151c26", "#1b3f63", "#2f78b5", "#74b6ee", "#e6f3ff"),
    accents=(
        "#4aa8ff",
        "#ff7a3c",
        "#f7aede",
        "#1fc79a",
        "#f2d65c",
        "#8b949e",
        "#ff6070",
        "#7fe3f0",
    ),
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}

Draw = Callable[[Theme], Figure]


def new_figure(height: float) -> Figure:
    """A figure of the width that all share; ``height`` in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)  # measures text, whatever the figure is saved as
    return figure


def headline(figure: Figure, theme: Theme, title: str, *lines: str) -> float:
    """Write a picture's title and the lines under it; returns their height in inches."""
    height = figure.get_figheight()
    top = 0.12
    figure.text(0.12 / WIDTH, 1 - top / height, title, fontsize=11, weight="bold", va="top")
    top += 0.25
    for line in lines:
        y = 1 - top / height
        figure.text(0.12 / WIDTH, y, line, fontsize=8.5, color=theme.quiet, va="top")
        top += 0.165
    return top


def caption(figure: Figure, theme: Theme, text: str) -> None:
    """Write where the data come from at a picture's foot."""
    y = 0.09 / figure.get_figheight()
    figure.text(0.12 / WIDTH, y, text, fontsize=7.5, color=theme.quiet, va="bottom")


def readable(theme: Theme, color: tuple[float, float, float, float]) -> str:
    """Ink or page, whichever stands out more from a cell's colour."""
    red, green, blue, _ = color
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
    return theme.ink if light == (theme.name == "light") else theme.background


def save(draw: Draw, output: str | Path, themes: Sequence[Theme]) -> list[Path]:
    """Draw a picture for each theme and write it.

    Args:
        draw: Makes the figure; called inside matplotlib's settings of the theme.
        output: Path without ``-light`` and suffix; with ``.png`` or ``.svg`` only that is written.
        themes: Which ones.

    Returns:
        The files written.

    Raises:
        OSError: A file can't be written; the message names it.
    """
    path = Path(output)
    suffixes: Sequence[str] = SUFFIXES
    if path.suffix in SUFFIXES:
        path, suffixes = path.with_suffix(""), [path.suffix]
    files = []
    for theme in themes:
        with matplotlib.rc_context(theme.settings()):
            figure = draw(theme)
            for suffix in suffixes:
                file = path.with_name(f"{path.name}-{theme.name}{suffix}")
                content = _png(figure) if suffix == ".png" else _svg(figure)
                write(file, content)
                files.append(file)
    return files


def check_writable(output: str | Path) -> None:
    """Make the folder that a picture goes to, or say that it can't be made.

    Raises:
        OSError: The folder can't be made or written to.
    """
    folder = Path(output).parent
    probe = folder / f".{Path(output).name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error


def write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: It can't be written; the message names it.
    """
    try:
        write_whole(file, content)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(path: Path, error: OSError) -> OSError:
    reason = (error.strerror or "unknown reason").lower()
    return OSError(f"-o: {path} can't be written: {reason}; give another path.")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return _palette(stream)


def _palette(stream: io.BytesIO) -> bytes:
    """A PNG in 256 colours: a quarter of the bytes, and no difference to see."""
    image = Image.open(stream).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    image.save(stream, format="png", optimize=True)
    return stream.getvalue()


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _IMAGE.sub(_smaller, stream.getvalue())


# Images within an SVG, which matplotlib stores with four bytes a dot.
_IMAGE = re.compile(rb'(?<=data:image/png;base64,)[^"]*')


def _smaller(match: re.Match[bytes]) -> bytes:
    """An image of an SVG with a palette."""
    return b"\n" + base64.b64encode(_palette(io.BytesIO(base64.b64decode(match[0]))))
