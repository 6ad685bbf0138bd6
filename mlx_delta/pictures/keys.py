"""A kv head's delta key matrix above its attention map, along the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mlx_delta.method.attention import block_threshold

from .record import HeadRecord
from .theme import WIDTH, Theme, caption, headline, new_figure

LARGEST = 8.0  # changes of so many thresholds, and more, have the strongest colour
LEAST_WEIGHT = 1e-4  # attention below has the weakest
READABLE = 80  # tokens whose text fits under the axis
FINEST = 600  # dots across: of a longer text, several tokens share one
NOTABLE = 0.05  # far attention of the last query that is pointed out

HEIGHT = 7.6  # inches, and of its parts:
MATRIX, MAP, LEFT, RIGHT = 2.0, 3.6, 0.62, 0.15


def draw_keys(
    record: HeadRecord,
    theme: Theme,
    model: str,
    texts: Sequence[str],
    source: str,
    span: tuple[int, int] | None = None,
) -> Figure:
    """The picture.

    Args:
        record: From :func:`mlx_delta.pictures.record.record_head`.
        theme: Colours.
        model: Its name.
        texts: The tokens' own texts, shown where there is room.
        source: What text it is, and when it was read.
        span: First key to show, and the end; all of them when not given.
    """
    first, end = span or (0, len(record.keys))
    named = end - first <= READABLE
    height = HEIGHT + (0.5 if named else 0)
    figure = new_figure(height)
    config = record.config
    unit = "× spread of each block" if config.threshold_mode == "relative" else "(absolute)"
    held = f"Threshold {config.head_threshold:g} {unit}"
    if config.cuts_runs:
        held = f"{str(config.threshold_mode).capitalize()} runs at level {config.run_level:g}"
    top = headline(
        figure,
        theme,
        f"{model}, layer {record.layer}, kv head {record.head}: what delta attention holds of "
        f"{len(record.keys):,} keys",
        f"{held}. {record.zero_share:.1%} of the far deltas "
        f"are zero; prefill skips {record.sparsity:.1%} of this head's QKᵀ.",
    )
    _legend(figure, theme, record, 1 - top / height)
    bottom = 0.72 + (0.5 if named else 0)
    width = (WIDTH - LEFT - RIGHT) / WIDTH
    attention = figure.add_axes((LEFT / WIDTH, bottom / height, width, MAP / height))
    low = (bottom + MAP + 0.28) / height
    matrix = figure.add_axes((LEFT / WIDTH, low, width, MATRIX / height), sharex=attention)
    _draw_matrix(matrix, theme, record)
    _draw_attention(attention, theme, record)
    attention.set_xlim(first - 0.5, end - 0.5)
    _point_out(attention, theme, record, texts)
    if named:
        labels = [_visible(text) for text in texts[first:end]]
        attention.set_xticks(range(first, end), labels, rotation=90, fontsize=6)
        attention.set_xlabel(f"key: tokens {first:,} to {end - 1:,}")
    else:
        attention.set_xlabel("key, position in tokens")
    heads = f", mean of its {record.query_heads} query heads" if record.query_heads > 1 else ""
    attention.set_title(f"Attention{heads}: held keys below the line, full keys above it", pad=4)
    caption(
        figure,
        theme,
        f"One prefill of {source}, by mlx_delta.pictures keys.",
    )
    return figure


def matrix_colors(record: HeadRecord, theme: Theme) -> np.ndarray:
    """RGB [D, N, 3] of the delta key matrix, channels down and tokens across."""
    colors = np.empty((*record.delta.shape, 3))
    size = np.abs(record.delta) / np.maximum(_thresholds(record)[:, None], 1e-30)
    strength = np.clip(np.log2(np.maximum(size, 1)) / np.log2(LARGEST), 0, 1)
    colors[:] = theme.colormap(0.4 + 0.6 * strength)[..., :3]
    colors[record.held] = to_rgb(theme.ramp[0])
    colors[record.exact] = to_rgb(theme.accents[1])
    colors[record.far :] = to_rgb(theme.grid)
    return colors.transpose(1, 0, 2)


def _thresholds(record: HeadRecord) -> np.ndarray:
    """The threshold at each token [N]; that of its block. Where there is none, its spread."""
    size, config = record.config.block_size, record.config
    if config.cuts_runs:
        config = config.changed(threshold=1.0)
    values = np.full(len(record.keys), np.inf, np.float32)
    for start in range(0, len(record.keys) - size + 1, size):
        values[start : start + size] = block_threshold(record.keys[start : start + size], config)
    return values


def _draw_matrix(axes: Axes, theme: Theme, record: HeadRecord) -> None:
    tokens, channels = record.delta.shape
    colors = matrix_colors(record, theme)
    axes.imshow(
        _pooled(colors, 1, np.mean),
        aspect="auto",
        interpolation="none",
        extent=(-0.5, tokens - 0.5, channels - 0.5, -0.5),
    )
    axes.set_ylabel("channel of the key")
    axes.set_yticks([0, channels // 2, channels - 1])
    axes.tick_params(labelbottom=False)
    what = "Delta key matrix, Kᵀ"
    if record.config.cuts_runs:
        what += ": each token against the one before it in its block's own sequence"
    axes.set_title(what, pad=4)


def _draw_attention(axes: Axes, theme: Theme, record: HeadRecord) -> None:
    tokens = len(record.keys)
    norm = LogNorm(LEAST_WEIGHT, 1)
    # The greatest weight of those that share a dot: single keys that are looked at stay visible.
    weights = np.where(np.tri(tokens, dtype=bool), record.attention, -1)
    weights = _pooled(_pooled(weights, 0, np.max), 1, np.max)
    colors = theme.colormap(norm(np.maximum(weights, LEAST_WEIGHT)))[..., :3]
    colors[weights < 0] = to_rgb(theme.background)
    axes.imshow(
        colors,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, tokens - 0.5, tokens - 0.5, -0.5),
    )
    axes.set_ylabel("query, position in tokens")
    border, sinks = theme.accents[1], record.config.sinks
    xs, ys = staircase(record)
    axes.plot(xs, ys, color=border, lw=1.1)
    if sinks:
        axes.plot([sinks - 0.5] * 2, [ys[0], tokens - 0.5], color=border, lw=0.8)
    bar = axes.inset_axes((0.66, 0.86, 0.3, 0.035))
    colorbar = axes.get_figure().colorbar(
        ScalarMappable(norm, theme.colormap), cax=bar, orientation="horizontal"
    )
    colorbar.set_label("attention weight", fontsize=8)
    colorbar.outline.set_visible(False)
    colorbar.ax.tick_params(labelsize=7, which="both", length=2)
    colorbar.ax.minorticks_off()


def _point_out(axes: Axes, theme: Theme, record: HeadRecord, texts: Sequence[str]) -> None:
    """Mark the held key that the last query looks at most, if it does at all."""
    last = len(record.keys) - 1
    far = record.attention[last, record.config.sinks : record.far]
    key = record.config.sinks + int(far.argmax())
    weight = float(record.attention[last, key])
    first, end = (round(x + 0.5) for x in axes.get_xlim())
    if weight < NOTABLE or not first <= key < end:
        return
    axes.plot(key, last, "o", ms=9, mfc="none", mec=theme.accents[3], mew=1.6, clip_on=False)
    whole = end - first == last + 1
    axes.annotate(
        f"The last token “{_visible(texts[last])}” looks at “{_visible(texts[key])}”,\n"
        f"{last - key:,} tokens back, through its held key:\nweight {weight:.2f}",
        (key, last),
        (0.63, 0.62) if whole else (0.02, 0.96),
        textcoords="axes fraction",
        va="top",
        bbox={"fc": theme.background, "ec": "none", "alpha": 0.85, "pad": 1},
        arrowprops={"arrowstyle": "-", "color": theme.accents[3], "lw": 1.2, "shrinkB": 5},
    )


def _pooled(values: np.ndarray, axis: int, pool: Callable[..., np.ndarray]) -> np.ndarray:
    """Neighbours along an axis joined, so that there are at most ``FINEST``."""
    length = values.shape[axis]
    joined = -(-length // FINEST)
    if joined == 1:
        return values
    starts = range(0, length, joined)
    parts = [np.take(values, range(i, min(i + joined, length)), axis) for i in starts]
    return np.stack([pool(part, axis=axis) for part in parts], axis=axis)


def staircase(record: HeadRecord) -> tuple[list[float], list[float]]:
    """The line, as xs and ys, between the keys that queries see held and those seen in full."""
    size, window = record.config.block_size, record.config.window_blocks
    xs, ys = [], []
    for start in range((window + 1) * size, len(record.keys), size):
        boundary = start - window * size
        xs += [boundary - size - 0.5, boundary - 0.5, boundary - 0.5]
        ys += [start - 0.5, start - 0.5, min(start + size, len(record.keys)) - 0.5]
    return xs, ys


def _legend(figure: Figure, theme: Theme, record: HeadRecord, top: float) -> None:
    ramp = theme.colormap
    whole = "keyframes and sinks" if record.config.keyframes else "sinks"
    handles: list[Patch | Line2D] = [
        Patch(fc=theme.ramp[0], ec=theme.quiet, lw=0.5, label="held: a zero"),
        Patch(
            fc=ramp(0.4),
            label=f"changes by 1 {'spread' if record.config.cuts_runs else 'threshold'}",
        ),
        Patch(fc=ramp(1.0), label=f"by {LARGEST:g} or more"),
        Patch(fc=theme.accents[1], label=f"{whole}: stored whole"),
        Patch(fc=theme.grid, label="window of the last query"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, top),
        ncols=len(handles),
        handlelength=1.0,
        handleheight=1.0,
        handletextpad=0.4,
        columnspacing=1.1,
        borderaxespad=0.3,
        fontsize=8,
    )


def _visible(text: str) -> str:
    """A token's text with its blanks shown, and nothing that matplotlib would take for TeX."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    return shown.replace(" ", "·") if shown.strip() else "·" * len(shown)
