"""Sensitivities of a model's keys: what its output makes of an error of each channel.

Two ways. ``"gradients"``: one backward pass gives the Fisher information of each far key, whose
mean over keys is the weight. ``"queries"``, for models that can't be differentiated: the mean
square of the queries that look at a channel. Both can be corrected by measurement: with one layer
held at a time, its weights are multiplied by what the divergence is over what they predict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.attention.probe import Seen, held_layers, watch_keys
from mlx_delta.config import DeltaConfig
from mlx_delta.models.queries import QuerySquares, shared_by_pairs
from mlx_delta.ops.hold import hold_blocks
from mlx_delta.sensitivities import Sensitivities

from .divergence import DenseText
from .gradients import far_gradients
from .recall import Recall

Way = Literal["gradients", "queries"]

MOST_CORRECTION = 8.0  # of a layer, either way
# Of the weights, that comes from what has to be recalled: of 0, .3 and .7 the one that lost least
# where facts were asked for (SmolLM2-135M), at hardly more in prose. docs/calibrate.md has figures.
RECALLED = 0.7
LEAST_SHARE = 1e-6  # of a layer's mean weight, for channels that nothing depends on


@dataclass(frozen=True)
class Watched:
    """A window as a model reads it densely.

    Attributes:
        layers: Which layers hold keys; the first axis of what follows.
        keys: For each float32 [Hkv, L, D], after RoPE.
        queries: For each float32 [Hkv, D], see :class:`mlx_delta.models.queries.QuerySquares`.
        value_squares: For each float32 [Hkv, L], the mean square of each value.
    """

    layers: tuple[int, ...]
    keys: list[mx.array]
    queries: list[np.ndarray]
    value_squares: list[np.ndarray]


class Felt(NamedTuple):
    """What a model's output makes of errors in a window.

    Attributes:
        weights: float32 [Hkv, D] for each held layer, of errors of its keys.
        predicting: What predicts the divergence of errors of this window's keys, [Hkv, L, D]:
            squared gradients, or the weights over again.
        values: float32 [Hkv] for each held layer, what errors of its values cost if each value errs
            by the same part of its size; ``None``: not known.
    """

    weights: list[np.ndarray]
    predicting: list[np.ndarray]
    values: list[np.ndarray] | None


def watch(model: nn.Module, window: Sequence[int], config: DeltaConfig) -> Watched:
    """Run the model over a window and keep its keys and what its queries look at."""
    layers = held_layers(model)
    keys: dict[int, mx.array] = {}
    value_squares: dict[int, mx.array] = {}
    squares = QuerySquares()

    def see(layer: int, seen: Seen) -> None:
        squares.add(layer, seen)
        keys[layer] = seen.keys[0].astype(mx.float32)
        value_squares[layer] = mx.square(seen.values[0].astype(mx.float32)).mean(axis=2)

    watch_keys(model, window, config, layers, see)
    mx.eval(keys, value_squares)
    return Watched(
        layers,
        [keys[i] for i in layers],
        [squares.of_layer(i) for i in layers],
        [np.array(value_squares[i]) for i in layers],
    )


def measure_weights(
    model: nn.Module,
    window: Sequence[int],
    config: DeltaConfig,
    watched: Watched,
    way: Way,
    seed: int = 0,
) -> Felt:
    """Weights of each held layer's channels, and of each of its elements.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        window: Token ids.
        config: Which keys are far.
        watched: Of the same window.
        way: What the weights are made from.
        seed: Of the labels that are drawn for gradients.
    """
    if way == "queries":
        weights = [_floored(x) for x in watched.queries]
        return Felt(weights, [w[:, None] for w in weights], None)
    of_keys, of_values = far_gradients(model, window, config, watched.layers, seed)
    squares = [np.array(x) for x in of_keys]
    # Keys that some query sees as far.
    end = ((len(window) - 1) // config.block_size - config.window_blocks) * config.block_size
    far = slice(min(config.sinks, end - 1), end)
    weights = [_floored(shared_by_pairs(x[:, far].mean(axis=1))) for x in squares]
    # Together, token by token: the tokens that most is asked of often have small values.
    pairs = zip(of_values, watched.value_squares, strict=True)
    values = [(np.array(x.mean(axis=2)) * own)[:, far].mean(axis=1) for x, own in pairs]
    return Felt(weights, squares, values)


@dataclass(frozen=True)
class Recalled:
    """What matters where something has to be recalled, in units of what matters in prose.

    Attributes:
        watched: The text's keys, of those that are far from all that is asked.
        weights: Of each held layer, float32 [Hkv, D].
        squares: Of each held layer, [Hkv, L, D].
    """

    watched: Watched
    weights: list[np.ndarray]
    squares: list[np.ndarray]

    def mixed(self, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Weights of prose and these, in fixed shares."""
        pairs = zip(weights, self.weights, strict=True)
        return [_floored((1 - RECALLED) * own + RECALLED * other) for own, other in pairs]


def measure_recall(
    model: nn.Module,
    recall: Recall,
    config: DeltaConfig,
    weights: Sequence[np.ndarray],
    seed: int = 0,
) -> Recalled:
    """What matters to a model that is asked for what it was told.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        recall: What is told and asked.
        config: Which keys are far.
        weights: Of each held layer, [Hkv, D], from prose.
        seed: Of the labels.
    """
    watched = watch(model, recall.ids, config)
    found, _ = far_gradients(model, recall.ids, config, watched.layers, seed, recall.asked)
    end = (recall.told // config.block_size - config.window_blocks) * config.block_size
    far = slice(min(config.sinks, end - 1), end)
    means = [shared_by_pairs(np.array(x[:, far].mean(axis=1))) for x in found]
    unit = sum(float(x.sum()) for x in weights) / sum(float(x.sum()) for x in means)
    seen = end + config.window_blocks * config.block_size + 1
    keys = [x[:, :seen] for x in watched.keys]
    squares = [np.array(x[:, :seen]) * unit for x in found]
    own = [_floored(x * unit) for x in means]
    return Recalled(dataclasses.replace(watched, keys=keys), own, squares)


def _floored(weights: np.ndarray) -> np.ndarray:
    return np.maximum(weights, LEAST_SHARE * weights.mean()).astype(np.float32)


def correct_layers(
    text: DenseText,
    config: DeltaConfig,
    watched: Watched,
    weights: Sequence[np.ndarray],
    salience: Sequence[np.ndarray | None],
    predicting: Sequence[np.ndarray],
    progress: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Weights times what holding each layer alone does, over what they predict.

    Args:
        text: The window that was watched.
        config: With the level to hold at.
        watched: Keys of that window.
        weights: Of each held layer, [Hkv, D].
        salience: Of each held layer, [Hkv, D], or ``None``.
        predicting: What predicts the divergence, see :func:`measure_weights`.
        progress: Called after each layer.
    """
    n_layers = text.n_layers
    ratios = []
    for i, layer in enumerate(watched.layers):
        everywhere: list[np.ndarray | None] = [None] * n_layers
        along = list(everywhere)
        everywhere[layer], along[layer] = weights[i], salience[i]
        setting = config.changed(sensitivities=Sensitivities(everywhere, salience=along))
        own = setting.for_layer(layer, n_layers)
        measured = text.compare(setting, only=layer).divergence
        keys = watched.keys[i]
        # Of the text that is compared, which may be shorter, up to where no query sees it as far.
        whole = (len(text.window) - 1) // config.block_size - config.window_blocks
        whole *= config.block_size
        held, _ = hold_blocks(keys[None, :, :whole], own)
        error = np.array(mx.square(held[0] - keys[:, :whole]))
        predicted = float((predicting[i][:, :whole] * error).sum())
        ratios.append(max(measured, 1e-9) / max(predicted, 1e-30))
        progress()
    logs = np.log(ratios)
    factors = np.exp(np.clip(logs - logs.mean(), *np.log([1 / MOST_CORRECTION, MOST_CORRECTION])))
    return [(w * f).astype(np.float32) for w, f in zip(weights, factors, strict=True)]
