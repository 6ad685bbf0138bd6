"""What a model's output makes of its keys: gradients, and the queries that look at them.

A :class:`KeyProbe` takes the place of a layer's cache. Attention is dense, and differentiable
with respect to a shift added to each key where it is seen as far: there, and only there, a held
key would stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.cache.single import DeltaKVCache
from mlx_delta.config import DeltaConfig


class KeyProbe(DeltaKVCache):
    """Stands in for the cache of one layer, for a whole text at once.

    Attributes:
        shift: [1, Hkv, L, D], added to the keys as far ones; 0.
        see: Called with the queries [1, Hq, L, D] and keys [1, Hkv, L, D] of the text.
    """

    def __init__(self, config: DeltaConfig, see: Callable[[mx.array, mx.array], None] | None):
        super().__init__(config)
        self.shift: mx.array | None = None
        self.see = see

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Causal attention over one text, [1, Hq, L, D]."""
        if self.see is not None:
            self.see(queries, keys)
        if self.shift is None:
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask="causal"
            )
        _, n_heads, length, _ = queries.shape
        groups = n_heads // keys.shape[1]
        near, causal = near_and_causal(length, self.config)
        own = queries.astype(mx.float32) * scale
        own = own.reshape(1, keys.shape[1], groups, length, -1)
        scores = own @ keys[:, :, None].astype(mx.float32).swapaxes(-1, -2)
        far = mx.logical_and(causal, mx.logical_not(near))
        apply: Any = _with_shift
        scores = apply(scores, self.shift, own, far)
        weights = mx.softmax(mx.where(causal, scores, -mx.inf), axis=-1)
        output = weights @ values[:, :, None].astype(mx.float32)
        return output.reshape(1, n_heads, length, -1).astype(queries.dtype)


def near_and_causal(length: int, config: DeltaConfig) -> tuple[mx.array, mx.array]:
    """Which pairs [L, L] of a text are computed with the full key, and which are seen at all."""
    query, key = mx.arange(length)[:, None], mx.arange(length)[None]
    size = config.block_size
    near = (key // size >= query // size - config.window_blocks) | (key < config.sinks)
    return near, key <= query


@mx.custom_function
def _with_shift(scores: mx.array, shift: mx.array, queries: mx.array, far: mx.array) -> mx.array:
    """Scores [1, Hkv, groups, L, L] of queries with keys, shifted by ``shift`` where far.

    The shift is 0, so the scores stay as they are; only its gradient is of interest.
    """
    return scores


@_with_shift.vjp
def _with_shift_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    _, _, queries, far = primals
    seen = mx.where(far, cotangent, 0)
    shift = (seen.swapaxes(-1, -2) @ queries).sum(axis=2)
    return cotangent, shift, mx.zeros_like(queries), mx.zeros_like(far)


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
    caches = _probes(model, config, layers, None)
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


def watch_keys(
    model: nn.Module,
    window: Sequence[int],
    config: DeltaConfig,
    layers: Sequence[int],
    see: Callable[[int, mx.array, mx.array], None],
) -> None:
    """Run the model densely over a window; ``see`` gets each layer's queries and keys."""
    caches = _probes(model, config, layers, see)
    mx.eval(model.model(mx.array(list(window))[None], cache=caches))


def _probes(
    model: nn.Module,
    config: DeltaConfig,
    layers: Sequence[int],
    see: Callable[[int, mx.array, mx.array], None] | None,
) -> list[Any]:
    """Caches for one pass over a text: probes for these layers, the model's own elsewhere."""

    def watcher(layer: int) -> Callable[[mx.array, mx.array], None] | None:
        return None if see is None else lambda queries, keys: see(layer, queries, keys)

    caches = model.make_cache()
    for layer in layers:
        caches[layer] = KeyProbe(config, watcher(layer))
    return caches


def _key_shapes(
    model: nn.Module, config: DeltaConfig, layers: Sequence[int], window: Sequence[int]
) -> list[tuple[int, int]]:
    """(kv heads, head_dim) of each of these layers."""
    shapes = {}

    def see(layer: int, queries: mx.array, keys: mx.array) -> None:
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
