"""Which keys a model looks at: for each kv head a direction along which errors are felt more.

Squared gradients say how much each far key of a window mattered. How much that is on average, of
keys like it in a block, is predicted from the key and from how far it stands out: a regression with
a logarithmic link, whose coefficients of the key are the salience. It is the mean that is fitted
and not the mean logarithm: what a lost key costs is what it costs on average, and the few tokens
that matter most are most of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_delta.config import DeltaConfig

from .weights import Watched

RIDGE = 0.5  # in units of the number of keys and their variance
STEPS = 16  # each halves what is left to go
_LOWEST, _HIGHEST = -6.0, 4.0  # of a prediction's logarithm

_TINY = 1e-8


class _Rows(NamedTuple):
    """A head's far keys.

    Attributes:
        keys: Deviations from their block's mean, [N, D].
        apart: Half the logarithm of how far they stand out, [N]: of the distance.
        felt: What was felt of each, in units of its block's mean, [N].
    """

    keys: np.ndarray
    apart: np.ndarray
    felt: np.ndarray


def measure_salience(
    watched: Sequence[Watched],
    squares: Sequence[Sequence[np.ndarray]],
    weights: Sequence[np.ndarray],
    config: DeltaConfig,
) -> list[np.ndarray]:
    """The salience of each held layer, float32 [Hkv, D].

    Args:
        watched: Windows, with their keys.
        squares: Of each window and held layer, squared gradients [Hkv, L, D].
        weights: Of each held layer, the mean of these squares over keys, [Hkv, D].
        config: Which keys are far, and which share a block.
    """
    found = []
    for i, own in enumerate(weights):
        heads = []
        for head, weight in enumerate(own):
            parts = [
                _rows(np.array(window.keys[i][head]), of_window[i][head], weight, config)
                for window, of_window in zip(watched, squares, strict=True)
            ]
            heads.append(_fit(_Rows(*map(np.concatenate, zip(*parts, strict=True)))))
        found.append(np.stack(heads))
    return found


def _rows(
    keys: np.ndarray, squares: np.ndarray, weight: np.ndarray, config: DeltaConfig
) -> _Rows:
    """Of a head's keys [L, D] those that some query sees as far, but for sinks, which are exact."""
    size = config.block_size
    blocks = (len(keys) - 1) // size - config.window_blocks
    keys, squares = (x[: blocks * size].reshape(blocks, size, -1) for x in (keys, squares))
    deviation = (keys - keys.mean(axis=1, keepdims=True)).astype(np.float64)
    apart = 0.5 * np.log((deviation * deviation * weight).sum(axis=2) + _TINY)
    felt = (squares / weight).mean(axis=2, dtype=np.float64)
    felt = felt / np.maximum(felt.mean(axis=1, keepdims=True), _TINY)
    rows = deviation, apart - apart.mean(axis=1, keepdims=True), felt
    used = np.arange(blocks * size) >= config.sinks
    return _Rows(*(x.reshape(blocks * size, *x.shape[2:])[used] for x in rows))


def _fit(rows: _Rows) -> np.ndarray:
    """Coefficients of the key's channels, float32 [D].

    Scoring for a gamma distribution, whose spread grows with its mean: each step is a least-squares
    fit with equal weights, and goes half of the way.
    """
    keys = np.concatenate([rows.keys, np.ones((len(rows.keys), 1))], axis=1)
    ridge = np.full(keys.shape[1], RIDGE * len(keys) * rows.keys.var() + _TINY)
    ridge[-1] = _TINY  # of the constant
    normal = keys.T @ keys + np.diag(ridge)
    found = np.linalg.solve(normal, keys.T @ (np.log(rows.felt + _TINY) - rows.apart))
    for _ in range(STEPS):
        logs = np.clip(keys @ found + rows.apart, _LOWEST, _HIGHEST)
        aim = logs - rows.apart + np.expm1(np.log(rows.felt + _TINY) - logs)
        found = (found + np.linalg.solve(normal, keys.T @ aim)) / 2
    return found[:-1].astype(np.float32)
