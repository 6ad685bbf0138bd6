"""Which keys a model looks at: for each kv head a direction along which errors are felt more.

Squared gradients say how much each far key of a window mattered. Their logarithm, within a block,
is predicted from the key itself and from how far it stands out, by ridge regression; the
coefficients of the key are the salience.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_delta.config import DeltaConfig

from .weights import Watched

# Of the regression's coefficients: what is predicted of a logarithm is uncertain, and a weight
# that is wrong costs more than one that is too even.
TRUST = 0.5
RIDGE = 0.1  # in units of the number of keys and their variance

_TINY = 1e-8


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
            heads.append(_fit(parts))
        found.append(np.stack(heads))
    return found


def _rows(
    keys: np.ndarray, squares: np.ndarray, weight: np.ndarray, config: DeltaConfig
) -> tuple[np.ndarray, np.ndarray]:
    """What predicts, [N, 1 + D], and what is predicted, [N], of a head's far keys [L, D]."""
    size = config.block_size
    blocks = (len(keys) - 1) // size - config.window_blocks  # that some query sees as far
    keys, squares = (x[: blocks * size].reshape(blocks, size, -1) for x in (keys, squares))
    deviation = keys - keys.mean(axis=1, keepdims=True)
    apart = np.log((deviation * deviation * weight).sum(axis=2, keepdims=True) + _TINY)
    felt = np.log((squares / weight).mean(axis=2) + _TINY)
    predicting = np.concatenate([apart - apart.mean(axis=1, keepdims=True), deviation], axis=2)
    felt = felt - felt.mean(axis=1, keepdims=True)
    if config.sinks:  # exact, and unlike all others
        predicting[0, : config.sinks] = felt[0, : config.sinks] = 0
    return predicting.reshape(-1, predicting.shape[2]), felt.ravel()


def _fit(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Coefficients of the key's channels, float32 [D]."""
    predicting = np.concatenate([x for x, _ in parts]).astype(np.float64)
    felt = np.concatenate([y for _, y in parts]).astype(np.float64)
    D = predicting.shape[1] - 1
    ridge = np.full(1 + D, RIDGE * len(felt) * predicting[:, 1:].var() + _TINY)
    ridge[0] = _TINY
    solved = np.linalg.solve(predicting.T @ predicting + np.diag(ridge), predicting.T @ felt)
    return (TRUST * solved[1:]).astype(np.float32)
