"""Gradients of what a model says, with respect to keys and values where they are seen as far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.attention.probe import KeyProbe, Seen, make_probes, watch_keys
from mlx_delta.config import DeltaConfig


def far_gradients(
    model: nn.Module,
    window: Sequence[int],
    config: DeltaConfig,
    layers: Sequence[int],
    seed: int,
    asked: Sequence[int] | None = None,
) -> tuple[list[mx.array], list[mx.array]]:
    """Squared gradients of what the model says, with respect to each far key and value.

    At each position that sees far keys, or that is asked for, one label is drawn from the model's
    own distribution; the sum of the labels' log-probabilities is differentiated. The squares'
    expectation is the diagonal of the Fisher information: half of it, times squared errors, is the
    KL divergence that they make, to second order.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        window: Token ids.
        config: Its block size, window and sinks say which keys are far.
        layers: Which layers hold keys.
        seed: Of the labels.
        asked: Positions whose next token counts; ``None``: all that see far keys.

    Returns:
        For each of these layers float32 [Hkv, L, D], of keys; and [Hkv, L, Dv], of values.

    Raises:
        ValueError: The model passes no gradients on.
    """
    caches = make_probes(model, config, layers, None)
    first = (config.window_blocks + 1) * config.block_size
    positions = mx.array(list(range(first, len(window)) if asked is None else asked))
    key = mx.random.key(seed)
    ids = mx.array(list(window))[None]

    def told(shifts: list[list[mx.array]]) -> mx.array:
        for layer, (shift, of_values) in zip(layers, shifts, strict=True):
            caches[layer].shift, caches[layer].value_shift = shift, of_values
        logits = model(ids, cache=caches)[0, positions].astype(mx.float32)
        labels = mx.stop_gradient(mx.random.categorical(logits, key=key))
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(logs, labels[:, None], axis=-1).sum()

    shapes, readers = _watch(model, config, layers, window[:1])
    shifts = [
        [mx.zeros((1, heads, len(window), size)) for size in sizes] for heads, *sizes in shapes
    ]
    with _checkpointed(model, {i: [caches[c] for c in read] for i, read in readers.items()}):
        gradients = mx.grad(told)(shifts)
        squares = [[mx.square(x[0].astype(mx.float32)) for x in pair] for pair in gradients]
        mx.eval(squares)
    of_keys, of_values = ([pair[i] for pair in squares] for i in (0, 1))
    if not all(bool(mx.isfinite(x).all()) and float(x.sum()) > 0 for x in of_keys):
        raise ValueError(
            "[calibrate] the model passes no finite gradients on to its keys; measure with "
            "--weights queries."
        )
    return of_keys, of_values


def _watch(
    model: nn.Module, config: DeltaConfig, layers: Sequence[int], window: Sequence[int]
) -> tuple[list[tuple[int, int, int]], dict[int, list[int]]]:
    """Shapes of keys and values, and who attends to them.

    Returns:
        (kv heads, D, Dv) of each of these caches; and for each of the model's layers that reads
        some of them, which. Layers without keys have no cache in some models, and layers that
        share keys have one together.
    """
    shapes: dict[int, tuple[int, int, int]] = {}
    readers: dict[int, list[int]] = {}
    running: list[int] = []

    def see(cache: int, seen: Seen) -> None:
        shapes[cache] = seen.keys.shape[1], seen.keys.shape[3], seen.values.shape[3]
        if running:
            readers.setdefault(running[-1], []).append(cache)

    def call(index: int, own: type) -> Callable[..., Any]:
        def run(layer: nn.Module, *args: Any, **named: Any) -> Any:
            running.append(index)
            try:
                return own.__call__(layer, *args, **named)  # type: ignore[operator]
            finally:
                running.pop()

        return run

    with _calling(model, call):
        watch_keys(model, window, config, layers, see)
    return [shapes[layer] for layer in layers], readers


@contextmanager
def _checkpointed(model: nn.Module, readers: Mapping[int, Sequence[KeyProbe]]) -> Iterator[None]:
    """The model with these layers computed anew on the way back, which saves their memory."""

    def call(index: int, own: type) -> Callable[..., Any] | None:
        if index not in readers:
            return None
        probes = readers[index]

        def run(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            def again(x: mx.array, shifts: list[Any]) -> Any:
                for probe, pair in zip(probes, shifts, strict=True):
                    probe.shift, probe.value_shift = pair
                return own.__call__(layer, x, *others, **named)  # type: ignore[operator]

            shifts: list[Any] = [(probe.shift, probe.value_shift) for probe in probes]
            output = mx.checkpoint(again)(x, shifts)
            for probe, pair in zip(probes, shifts, strict=True):
                probe.shift, probe.value_shift = pair  # those of the inside are no one else's
            return output

        return run

    with _calling(model, call):
        yield


@contextmanager
def _calling(
    model: nn.Module, call: Callable[[int, type], Callable[..., Any] | None]
) -> Iterator[None]:
    """The model with other ways of calling its layers, by their number and class."""
    layers = list(getattr(model, "layers", ()))
    classes = [type(layer) for layer in layers]
    try:
        for i, (layer, own) in enumerate(zip(layers, classes, strict=True)):
            if (run := call(i, own)) is not None:
                layer.__class__ = type(own.__name__, (own,), {"__call__": run})
        yield
    finally:
        for layer, own in zip(layers, classes, strict=True):
            layer.__class__ = own
