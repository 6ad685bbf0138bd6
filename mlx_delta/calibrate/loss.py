"""The loss of a text's windows with a setting, and the sparsest setting within a wanted loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.measure.settings import Setting

CHUNK = 512  # tokens at a time: the logits of a whole window may be too many to keep


def mean_loss(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    config: DeltaConfig | None,
    progress: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross-entropy in nats per token.

    Args:
        model: From :func:`mlx_delta.load`.
        windows: Token ids; the first of each is not predicted.
        config: ``None`` for dense attention.
        progress: Called after each window.
    """
    kind = "dense" if config is None else "delta"
    setting = Setting(kind, kind, delta=config)
    losses = []
    for window in windows:
        caches = setting.make_caches(model, len(window))
        nats = 0.0
        for start in range(0, len(window), CHUNK):
            logits = setting.forward(model, window[start : start + CHUNK], caches)
            targets = mx.array(list(window[start + 1 : start + CHUNK + 1]))
            logits = logits[: targets.size].astype(mx.float32)
            if targets.size:
                nats += float(nn.losses.cross_entropy(logits, targets, reduction="sum"))
        losses.append(nats / (len(window) - 1))
        progress()
    return float(np.mean(losses))


def sparsest_within(
    rise: Callable[[float], float], wanted: float, highest: float, steps: int
) -> float:
    """The highest sparsity at which the loss rises by no more than wanted, by bisection.

    Args:
        rise: The rise of the loss at a sparsity; all but growing with it.
        wanted: At most this rise.
        highest: Where to begin; taken if the loss rises by no more than wanted there.
        steps: How often the interval is halved.
    """
    if rise(highest) <= wanted:
        return highest
    low, high = 0.0, highest
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(middle) <= wanted else (low, middle)
    return low
