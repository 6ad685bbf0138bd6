"""Calibrating a model's sensitivities, and the curve of levels: what each holds, and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.attention.probe import held_layers
from mlx_delta.config import DeltaConfig
from mlx_delta.measure.text import context_length
from mlx_delta.ops.hold import hold_blocks
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.ternary.model import TernaryModel

from .codes import with_codes
from .divergence import Comparison, DenseText
from .recall import Recall, make_recall
from .salience import measure_salience
from .weights import Watched, Way, correct_layers, measure_recall, measure_weights, watch
from .windows import ProgressBar, check_length, cut_windows

LENGTH = 1024  # tokens of a window
CORRECTED = 512  # of them that are read once more for each layer
SHARES = (0.3, 0.45, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)  # of zeros, on the curve
USUAL = 0.65  # of zeros, at which layers are compared
GRID = np.geomspace(1e-3, 1e3, 25)  # of levels, in units of what a typical run costs


@dataclass(frozen=True)
class RunsCalibration:
    """What a calibration found.

    Attributes:
        config: The setting, with the sensitivities and the chosen level.
        chosen: What that does to the second window.
        curve: What the levels of the curve do to it.
        length: Tokens of each window.
    """

    config: DeltaConfig
    chosen: Comparison
    curve: tuple[tuple[float, Comparison], ...]
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sensitivities as plain JSON values."""
        return {
            "level": self.config.run_level,
            "length": self.length,
            "chosen": dataclasses.asdict(self.chosen),
            "curve": [{"level": level, **dataclasses.asdict(x)} for level, x in self.curve],
        }


def calibrate_text(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    sparsity: float | None = None,
    kl: float | None = None,
    way: Way | None = None,
    corrected: bool = True,
    recalled: bool = True,
    length: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> RunsCalibration:
    """As :func:`calibrate_runs`, of a text.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        tokenizer: Its tokenizer.
        text: What to calibrate on; two windows of it are.
        sparsity: Wanted share of the deltas outside the window that are zero.
        kl: Instead of it: the highest KL divergence from dense attention, in nats per token.
        way: What sensitivities are made from; gradients, if the model passes any on.
        corrected: Whether they are corrected by holding one layer at a time.
        recalled: Whether gradients are measured where something has to be recalled, too.
        length: Tokens of a window; 1,024 or the model's context if not given.
        seed: Of the labels drawn for gradients.
        progress: Show progress on stderr.

    Raises:
        ValueError: A wish that can't be fulfilled, or a text that is too short.
    """
    base = model.args.delta
    if (sparsity is None) == (kl is None):
        raise ValueError("[calibrate] give either a wanted sparsity or a wanted KL divergence.")
    if sparsity is not None and not 0 <= sparsity <= max(SHARES):
        raise ValueError(
            f"[calibrate] the share of zeros must be between 0 and {max(SHARES)} but got "
            f"{sparsity}."
        )
    if kl is not None and not (math.isfinite(kl) and kl >= 0):
        raise ValueError(f"[calibrate] KL, in nats per token, must be >= 0 but got {kl}.")
    context = context_length(model)
    length = check_length(length or min(LENGTH, context or LENGTH), context, base)
    windows = cut_windows(tokenizer, text, length, 2)
    if len(windows) < 2:
        raise ValueError(
            f"[calibrate] two windows of {length} tokens are needed but the text has one; give a "
            "longer --text or a smaller --length."
        )
    if way is None:
        way = "queries" if isinstance(model, TernaryModel) else "gradients"
    recall = None
    if way == "gradients" and recalled:
        recall = make_recall(tokenizer, windows[0], length, seed)
        # A short text may have no room for anything to be far when it is asked for.
        if not recall.asked or recall.told < (base.window_blocks + 2) * base.block_size:
            recall = None
    total = steps(len(held_layers(model)), corrected, recall is not None)
    with ProgressBar(total, "calibrating", progress, "step") as bar:
        return calibrate_runs(
            model,
            windows,
            base,
            sparsity=sparsity,
            kl=kl,
            way=way,
            corrected=corrected,
            recall=recall,
            seed=seed,
            progress=bar,
        )


def steps(n_layers: int, corrected: bool, recalled: bool) -> int:
    """How often progress is reported."""
    return 2 + (n_layers if corrected else 0) + recalled + len(SHARES) + 1


def calibrate_runs(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    base: DeltaConfig,
    *,
    sparsity: float | None = None,
    kl: float | None = None,
    way: Way = "gradients",
    corrected: bool = True,
    recall: Recall | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> RunsCalibration:
    """Measure sensitivities and choose the level for a wanted share of zeros, or divergence.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        windows: Two windows of one length: the first one gives the sensitivities, the second one
            the curve.
        base: The setting, optimal or greedy; its level and sensitivities are not used.
        sparsity: Wanted share of the deltas outside the window that are zero.
        kl: Instead of it: the highest KL divergence from dense attention, in nats per token.
        way: What sensitivities are made from.
        corrected: Whether they are corrected by holding one layer at a time.
        recall: What is to be recalled, for ``way="gradients"``.
        seed: Of the labels drawn for gradients.
        progress: Called after each step, see :func:`steps`.

    Raises:
        ValueError: The wish lies beyond the curve, or the model passes no gradients on.
    """
    first, second = windows
    watched = watch(model, first, base)
    progress()
    weights, predicting, of_values = measure_weights(model, first, base, watched, way, seed)
    salience: Sequence[np.ndarray | None] = [None] * len(weights)
    recalled = None
    progress()
    if way == "gradients" and recall is not None:
        recalled = measure_recall(model, recall, base, weights, seed)
        progress()
    if way == "gradients":
        texts, squares, mixed = [watched], [predicting], weights
        if recalled is not None:
            texts, squares = [watched, recalled.watched], [predicting, recalled.squares]
            mixed = recalled.mixed(weights)
        salience = measure_salience(texts, squares, mixed, base)
    n_layers = len(model.make_cache())
    if corrected:
        felt = _filled(watched, weights, salience, n_layers)
        level = _level_for(watched, felt, base, USUAL)
        start = (base.window_blocks + 1) * base.block_size
        text = DenseText(model, first[:CORRECTED], min(start, len(first) - 1))
        held = base.changed(level=level)
        weights = correct_layers(text, held, watched, weights, salience, predicting, progress)
        del text
    if recalled is not None:
        weights = recalled.mixed(weights)
    sensitivities = _filled(watched, weights, salience, n_layers)
    held = base.changed(sensitivities=sensitivities)
    levels, shares = _shares(watched, held)
    text = DenseText(model, second, len(second) // 2)
    curve: list[tuple[float, Comparison]] = []
    for share in SHARES:
        level = float(f"{np.exp(np.interp(share, shares, np.log(levels))):.4g}")
        if curve and level <= curve[-1][0]:
            continue  # beyond what can be held
        curve.append((level, text.compare(held.changed(level=level))))
        progress()
    rows = [(level, found.zeros, found.divergence) for level, found in curve]
    curve_rows = [(0.0, 0.0, 0.0), *rows]
    sensitivities = with_codes(sensitivities.with_curve(curve_rows), watched, of_values, base)
    level = float(f"{sensitivities.level_for(sparsity, kl):.4g}")
    config = base.changed(sensitivities=sensitivities, level=level)
    chosen = text.compare(config)
    progress()
    return RunsCalibration(config, chosen, tuple(curve), len(first))


def _filled(
    watched: Watched,
    weights: Sequence[np.ndarray],
    salience: Sequence[np.ndarray | None],
    n_layers: int,
) -> Sensitivities:
    layers: list[np.ndarray | None] = [None] * n_layers
    along = list(layers)
    for layer, own, direction in zip(watched.layers, weights, salience, strict=True):
        layers[layer], along[layer] = own, direction
    return Sensitivities(layers, salience=along)


def _level_for(
    watched: Watched, sensitivities: Sensitivities, base: DeltaConfig, share: float
) -> float:
    levels, shares = _shares(watched, base.changed(sensitivities=sensitivities))
    return float(np.exp(np.interp(share, shares, np.log(levels))))


def _shares(watched: Watched, config: DeltaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Shares of zeros of a window's keys over levels, both ascending."""
    n_layers = len(config.loaded_sensitivities.layers)
    unit = _typical_cost(watched, config)
    levels = unit * GRID
    shares = np.zeros(len(levels))
    for i, level in enumerate(levels):
        held = config.changed(level=float(level))
        zeros = total = 0
        for layer, keys in zip(watched.layers, watched.keys, strict=True):
            whole = keys.shape[1] // config.block_size * config.block_size
            own = held.for_layer(layer, n_layers)
            zeros += int(hold_blocks(keys[None, :, :whole], own)[1].sum())
            total += keys[:, :whole].size
        shares[i] = zeros / total
        if shares[i] >= max(SHARES) + 0.02:
            return levels[: i + 1], np.maximum.accumulate(shares[: i + 1])
    return levels, np.maximum.accumulate(shares)


def _typical_cost(watched: Watched, config: DeltaConfig) -> float:
    """The median over channels of the level at which one is likely to be held as a whole."""
    costs = []
    for layer, keys in zip(watched.layers, watched.keys, strict=True):
        weights = config.loaded_sensitivities.layers[layer]
        assert weights is not None
        costs.append(np.sqrt(weights) * np.array(mx.var(keys, axis=1)))
    return float(np.median(np.concatenate(costs)))
