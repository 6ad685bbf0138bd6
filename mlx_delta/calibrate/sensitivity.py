"""What holding a layer's keys does to what the model says: KL divergences, one layer at a time.

One layer, or one kv head, is held at a grid of thresholds while everything else attends densely.
So what later layers make of the error counts too, and what the model does not care about does
not. The divergences of single layers add up well as long as they are small, so their sum is the
cost of thresholds for all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.measure.settings import Setting

from .record import Recording

# In the units of the recording's grid, whose points they are; at 8 nearly all is held.
GRID = (0.35, 0.6, 1.0, 1.4, 2.0, 2.8, 8.0)
# Beyond it there is little left to skip, and most of a block is held as one value: what that costs
# shows where a text comes back to a detail, which is too rare to weigh in its mean divergence.
USUAL = 2.8
CHUNK = 128  # tokens at a time: in the scored half every query should see held keys as it decodes
KEPT_BYTES = 2**29  # of dense log-probabilities; their copies while they are read come on top

_TINY = 1e-12  # nats; has a logarithm


@dataclass(frozen=True)
class Sensitivity:
    """KL divergences of single layers or kv heads, in nats per token.

    Attributes:
        thresholds: [layers, G], ascending and above 0.
        divergence: [layers, units, G]; a unit is the whole layer or one of its kv heads.
        stored: [layers]: with nothing held. 0, but for settings that store keys or values in
            fewer bits.
        windows: How many were measured.
    """

    thresholds: np.ndarray
    divergence: np.ndarray
    stored: np.ndarray
    windows: int

    def cost(self, thresholds: np.ndarray) -> np.ndarray:
        """What holding costs at other thresholds.

        Lines between the logarithms of both: errors are as large as thresholds, and costs grow as
        a power of them. Below the first point as the square, which is what small errors do.

        Args:
            thresholds: [layers, K].

        Returns:
            [layers, units, K], growing with the threshold; without what storage alone costs.
        """
        held = np.maximum(self.divergence - self.stored[:, None, None], _TINY)
        held = np.maximum.accumulate(held, axis=2)
        costs = np.zeros((*held.shape[:2], thresholds.shape[1]))
        for i, (grid, wanted) in enumerate(zip(self.thresholds, thresholds, strict=True)):
            log_wanted = np.log(np.maximum(wanted, grid[0]))
            below = np.minimum(wanted / grid[0], 1) ** 2
            for j, curve in enumerate(held[i]):
                costs[i, j] = below * np.exp(np.interp(log_wanted, np.log(grid), np.log(curve)))
        return costs


def passes(layers: int, units: int, windows: int, config: DeltaConfig) -> int:
    """How often :func:`measure_sensitivity` runs the model over a window."""
    return windows * (1 + layers * (units * len(GRID) + _coded(config)))


def measure_sensitivity(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    config: DeltaConfig,
    recording: Recording,
    heads: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Hold one layer or kv head at a time and compare with dense attention.

    The first half of a window is prefilled and not scored; the second half is fed in chunks, so
    that its tokens are predicted from what the caches have kept.

    Args:
        model: From :func:`mlx_delta.load`.
        windows: Token ids, all of one length.
        config: Its geometry, mode and storage are used, its thresholds are not.
        recording: Of the same setting: which layers hold keys, and the units of thresholds.
        heads: kv heads of a layer, each to be measured alone; ``None``: whole layers.
        progress: Called after each pass of the model over a window.

    Raises:
        ValueError: The model's logits are not finite.
    """
    config = config.resolve(len(windows[0]))
    layers = recording.layers
    thresholds = recording.units[:, None] * np.array(GRID)
    divergence = np.zeros((len(layers), heads or 1, len(GRID)))
    stored = np.zeros(len(layers))
    for window in windows:
        dense = _Reference(model, window)
        progress()
        for i, layer in enumerate(layers):
            if _coded(config):
                stored[i] += dense.divergence(config, layer, 0.0)
                progress()
            for unit, g in np.ndindex(*divergence.shape[1:]):
                threshold: Any = float(thresholds[i, g])
                if heads is not None:
                    threshold = tuple(threshold if h == unit else 0.0 for h in range(heads))
                divergence[i, unit, g] += dense.divergence(config, layer, threshold)
                progress()
    n = len(windows)
    return Sensitivity(thresholds, divergence / n, stored / n, n)


class _Reference:
    """A window as the model reads it densely.

    Log-probabilities are kept as they are, in float32: in 16 bits their rounding is as large as
    the smaller divergences. So that they take no more than ``KEPT_BYTES`` whatever the
    vocabulary, only every so many tokens are compared if need be; all are where
    tokens * vocabulary * 4 bytes fit.
    """

    def __init__(self, model: nn.Module, window: Sequence[int]):
        self._model, self._window = model, window
        self._stride = 1
        self._logs: list[mx.array] = []
        setting = Setting("dense", "dense")
        for logits in self._read(setting, setting.make_caches(model)):
            if not self._logs:
                scored = len(window) - len(window) // 2
                self._stride = -(-scored * logits.shape[-1] * 4 // KEPT_BYTES)
            self._logs.append(_log_softmax(logits[:: self._stride]))
            mx.eval(self._logs[-1])

    def divergence(
        self, config: DeltaConfig, layer: int, threshold: float | tuple[float, ...]
    ) -> float:
        """Mean KL(p_dense || p_held) in nats, with one layer held and the others dense."""
        n_layers = len(Setting("dense", "dense").make_caches(self._model))
        thresholds = tuple(threshold if i == layer else 0.0 for i in range(n_layers))
        held = Setting("delta", "delta", dataclasses.replace(config, threshold=thresholds))
        caches = Setting("dense", "dense").make_caches(self._model)
        caches[layer] = held.make_caches(self._model)[layer]
        total, count = 0.0, 0
        for dense, logits in zip(self._logs, self._read(held, caches), strict=True):
            logs = _log_softmax(logits[:: self._stride])
            total += float((mx.exp(dense) * (dense - logs)).sum())
            count += len(dense)
        if not np.isfinite(total):
            raise ValueError(
                f"[calibrate] the model's logits are not finite with layer {layer} held at "
                f"{threshold}."
            )
        return total / count

    def _read(self, setting: Setting, caches: list[Any]) -> Iterator[mx.array]:
        """Logits [chunk, vocabulary] of the second half of the window."""
        half = len(self._window) // 2
        setting.prefill(self._model, self._window[:half], caches)
        for start in range(half, len(self._window), CHUNK):
            yield setting.forward(self._model, self._window[start : start + CHUNK], caches)


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _coded(config: DeltaConfig) -> bool:
    """Whether storage changes keys or values even where nothing is held."""
    return config.key_bits is not None or config.value_bits is not None
