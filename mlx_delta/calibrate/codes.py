"""What decides how many bits codes get: how far keys lie apart, and what errors of values cost.

See :mod:`mlx_delta.widths`. Keys' weights are those of the held keys; values have weights of their
own, from the same backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.config import DeltaConfig
from mlx_delta.measure.text import context_length
from mlx_delta.models.queries import block_spread
from mlx_delta.sensitivities import Sensitivities

from .weights import Watched, measure_weights, watch
from .windows import check_length, cut_windows

LENGTH = 1024  # tokens of the window


def with_codes(
    sensitivities: Sensitivities,
    watched: Watched,
    value_weights: Sequence[np.ndarray] | None,
    config: DeltaConfig,
) -> Sensitivities:
    """Sensitivities that say how many bits codes get.

    Args:
        sensitivities: With weights and salience.
        watched: A window.
        value_weights: Of each held layer's kv heads, [Hkv]; ``None``: not known.
        config: Its block size.
    """
    spread: list[np.ndarray | None] = [None] * len(sensitivities.layers)
    costs = list(spread)
    for i, layer in enumerate(watched.layers):
        spread[layer] = block_spread(watched.keys[i], config.block_size)
        if value_weights is not None:
            costs[layer] = np.sqrt(value_weights[i]) * watched.value_squares[i]
    return sensitivities.with_spread(spread, costs)


def calibrate_codes(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    length: int | None = None,
    seed: int = 0,
) -> DeltaConfig:
    """The model's setting, with what decides the bits of codes measured anew; the rest stays.

    Args:
        model: From :func:`mlx_delta.load`, calibrated.
        tokenizer: Its tokenizer.
        text: What to measure on; one window of it is.
        length: Tokens of the window; 1,024 or the model's context if not given.
        seed: Of the labels drawn for gradients.

    Raises:
        ValueError: The model was not calibrated, or a text that is too short.
    """
    base: DeltaConfig = model.args.delta
    found = base.sensitivities
    if not isinstance(found, Sensitivities) or not found.curve:
        raise ValueError(
            "[calibrate] --codes needs sensitivities that were measured; run "
            "`python -m mlx_delta.calibrate --sparsity 0.7` on the model first."
        )
    context = context_length(model)
    length = check_length(length or min(LENGTH, context or LENGTH), context, base)
    (window,) = cut_windows(tokenizer, text, length, 1)
    watched = watch(model, window, base)
    felt = measure_weights(model, window, base, watched, "gradients", seed)
    return base.changed(sensitivities=with_codes(found, watched, felt.values, base))
