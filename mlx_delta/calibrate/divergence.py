"""What a setting does to what a model says of a text: KL divergence from dense attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.cache import HeldKeys
from mlx_delta.config import DeltaConfig
from mlx_delta.measure.settings import Setting, far_share
from mlx_delta.measure.sparsity import measure_density, share_of_zeros

CHUNK = 512  # tokens at a time
KEPT_BYTES = 2**29  # of dense log-probabilities


@dataclass(frozen=True)
class Comparison:
    """Means over the scored tokens.

    Attributes:
        divergence: KL(p_dense || p_held) in nats.
        top1: Share of tokens where both rank the same token first.
        zeros: Share of the deltas of held keys that are zero.
        density: Of a prefill by tiles: the part of them that was computed.
        far_share: What far tokens take, of what they take in 16 bits; of caches that have any.
    """

    divergence: float
    top1: float
    zeros: float
    density: float | None = None
    far_share: float | None = None


class DenseText:
    """A window as the model reads it densely, to compare settings with.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        window: Token ids.
        first: The first scored position; before it little is held.
        prompt: How many tokens are a prompt, where a setting depends on that.
    """

    def __init__(
        self, model: nn.Module, window: Sequence[int], first: int, prompt: int | None = None
    ):
        self.model, self.window, self.first = model, list(window), first
        self.prompt = prompt
        self._dense = Setting("dense", "dense")
        self.n_layers = len(self._dense.make_caches(model))
        self._stride = 1
        self._logs: list[mx.array] = []
        for logits in self._read(self._dense, self._dense.make_caches(model)):
            if not self._logs:
                whole = (len(window) - first) * logits.shape[-1] * 4
                self._stride = -(-whole // KEPT_BYTES)
            self._logs.append(_log_softmax(logits[:: self._stride]))
            mx.eval(self._logs[-1])

    def held_layers(self, config: DeltaConfig) -> list[int]:
        """The layers that a setting of the delta applies to."""
        caches = Setting("delta", "delta", config).make_caches(self.model)
        return [i for i, cache in enumerate(caches) if isinstance(cache, HeldKeys)]

    def compare(self, config: DeltaConfig, only: int | None = None) -> Comparison:
        """The window read with a setting, or with one layer in it and the others dense.

        Raises:
            ValueError: The model's logits are not finite.
        """
        setting = Setting("delta", "delta", config)
        caches = self._dense.make_caches(self.model)
        own = setting.make_caches(self.model, self.prompt)
        held = range(self.n_layers) if only is None else [only]
        for layer in held:
            if isinstance(own[layer], HeldKeys):
                caches[layer] = own[layer]
        total = same = 0.0
        count = 0
        for dense, logits in zip(self._logs, self._read(setting, caches), strict=True):
            logs = _log_softmax(logits[:: self._stride])
            total += float((mx.exp(dense) * (dense - logs)).sum())
            same += float((mx.argmax(dense, axis=-1) == mx.argmax(logs, axis=-1)).sum())
            count += len(dense)
        if not np.isfinite(total):
            raise ValueError("[calibrate] the model's logits are not finite with keys held.")
        zeros, density = share_of_zeros(caches), measure_density(caches)
        return Comparison(total / count, same / count, zeros, density, far_share(caches))

    def _read(self, setting: Setting, caches: list[Any]) -> Iterator[mx.array]:
        """Logits [chunk, vocabulary] of the scored positions."""
        if self.first:
            setting.prefill(self.model, self.window[: self.first], caches, CHUNK)
        for start in range(self.first, len(self.window), CHUNK):
            yield setting.forward(self.model, self.window[start : start + CHUNK], caches)


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
