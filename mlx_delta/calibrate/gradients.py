"""Gradients of what a model says, with respect to its keys where they are seen as far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.attention.probe import KeyProbe, make_probes, watch_keys
from mlx_delta.config import DeltaConfig


def key_gradients(
    model: nn.Module,
    window: Sequence[int],
    config: DeltaConfig,
    layers: Sequence[int],
    seed: int,
) -> list[mx.array]:
    """Squared gradients of what the model says, with respect to each far key.

    At each position that sees far keys one label is drawn from the model's own distribution; the
    sum of the labels' log-probabilities is differentiated. The squares' expectation is the
    diagonal of the Fisher information: half of it, times squared errors, is the KL divergence
    that they make, to second order.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        window: Token ids.
        config: Its block size, window and sinks say which keys are far.
        layers: Which layers hold keys.
        seed: Of the labels.

    Returns:
        For each of these layers float32 [Hkv, L, D].

    Raises:
        ValueError: The model passes no gradients on.
    """
    caches = make_probes(model, config, layers, None)
    first = (config.window_blocks + 1) * config.block_size
    key = mx.random.key(seed)
    ids = mx.array(list(window))[None]

    def told(shifts: list[mx.array]) -> mx.array:
        for layer, shift in zip(layers, shifts, strict=True):
            caches[layer].shift = shift
        logits = model(ids, cache=caches)[0, first:].astype(mx.float32)
        labels = mx.stop_gradient(mx.random.categorical(logits, key=key))
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(logs, labels[:, None], axis=-1).sum()

    shapes = _key_shapes(model, config, layers, window[:1])
    shifts = [mx.zeros((1, heads, len(window), size)) for heads, size in shapes]
    with _checkpointed(model, caches, layers):
        gradients = mx.grad(told)(shifts)
        squares = [mx.square(gradient[0].astype(mx.float32)) for gradient in gradients]
        mx.eval(squares)
    if not all(bool(mx.isfinite(x).all()) and float(x.sum()) > 0 for x in squares):
        raise ValueError(
            "[calibrate] the model passes no finite gradients on to its keys; measure with "
            "--weights queries."
        )
    return squares


def _key_shapes(
    model: nn.Module, config: DeltaConfig, layers: Sequence[int], window: Sequence[int]
) -> list[tuple[int, int]]:
    """(kv heads, head_dim) of each of these layers."""
    shapes = {}

    def see(layer: int, queries: mx.array, keys: mx.array, scale: float) -> None:
        shapes[layer] = keys.shape[1], keys.shape[3]

    watch_keys(model, window, config, layers, see)
    return [shapes[layer] for layer in layers]


@contextmanager
def _checkpointed(model: nn.Module, caches: Sequence[Any], layers: Sequence[int]) -> Iterator[None]:
    """The model with its layers computed anew on the way back, which saves their memory."""
    classes = [type(layer) for layer in model.layers]

    def call(probe: KeyProbe, own: type) -> Callable[..., mx.array]:
        def run(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> mx.array:
            def again(x: mx.array, shift: mx.array) -> mx.array:
                probe.shift = shift
                return own.__call__(layer, x, *others, **named)  # type: ignore[operator]

            shift: Any = probe.shift
            return mx.checkpoint(again)(x, shift)

        return run

    try:
        for i in layers:
            own = classes[i]
            checkpointed = type(own.__name__, (own,), {"__call__": call(caches[i], own)})
            model.layers[i].__class__ = checkpointed
        yield
    finally:
        for layer, own in zip(model.layers, classes, strict=True):
            layer.__class__ = own
