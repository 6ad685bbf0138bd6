"""Keys and values that are handed through a model's own attention code without being looked at.

mlx-lm's quantized cache returns tuples from ``update_and_fetch``; a model passes them on to
``scaled_dot_product_attention``, which knows what they are. In the same way a cache of held keys,
seen through :class:`HandingCache`, returns :class:`HandedKeys`: which keys a query sees exactly
depends on the query, so they can't be one array. Code that computes with them itself fails at
once, rather than attend to something else.

``scaled_dot_product_attention`` has no hook, and nearly every model file imports it by name. So
:func:`hook` puts :func:`scaled_dot_product_attention` of this module in its place in the files of
one model's classes. For anything but :class:`HandedKeys` it calls mlx-lm's own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from mlx_delta.cache import HeldKeys
from mlx_delta.cache.step import Part

from .hybrid import attend_to_parts

NAME = "scaled_dot_product_attention"
_stock = base.scaled_dot_product_attention


class Handed:
    """Stands for an array [B, H, S, D] that may be passed on and asked for its shape, little more.

    Attributes:
        shape: As of the array.
        dtype: As of the array.
    """

    ndim = 4

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype):
        self.shape = shape
        self.dtype = dtype

    def astype(self, dtype: mx.Dtype) -> Handed:
        """Itself: attention computes in the wider of its type and the queries'."""
        return self


class HandedKeys(Handed):
    """Keys that know how to be attended to.

    Attributes:
        values: The values that belong to them.
    """

    values: Handed

    def attend(
        self, queries: mx.array, scale: float, mask: Any, head_sinks: mx.array | None
    ) -> mx.array:
        """Attention of queries [B, Hq, L, D] to all keys; [B, Hq, L, Dv]."""
        raise NotImplementedError


class HandedView(HandedKeys):
    """What an update of a cache of held keys left.

    Args:
        view: It, in parts.
        keys: [B, Hkv, L, D], the keys that were appended.
        values: [B, Hkv, L, Dv], their values.
    """

    def __init__(self, view: Sequence[Part], keys: mx.array, values: mx.array):
        B, H, _, D = keys.shape
        length = view[-1].step.length + max(view[-1].dropped)
        super().__init__((B, H, length, D), keys.dtype)
        self.values = Handed((B, H, length, values.shape[3]), values.dtype)
        self._view = view

    def attend(
        self, queries: mx.array, scale: float, mask: Any, head_sinks: mx.array | None
    ) -> mx.array:
        """Hybrid delta attention of queries [B, Hq, L, D]; [B, Hq, L, Dv]."""
        if mask is None and queries.shape[2] > 1:
            # To mlx-lm no mask means no mask; delta attention would take it as causal.
            mask = mx.ones((queries.shape[2], self.shape[2]), mx.bool_)
        return attend_to_parts(queries, self._view, scale, mask, head_sinks)


class _HandedProbe(HandedKeys):
    """Keys [B, Hkv, L, D] and values of a cache that attends in its own way, to one whole text."""

    def __init__(self, attend: Callable[..., mx.array], keys: mx.array, values: mx.array):
        super().__init__(keys.shape, keys.dtype)
        self.values = Handed(values.shape, values.dtype)
        self._attend = attend
        self._arrays = keys, values

    def attend(
        self, queries: mx.array, scale: float, mask: Any, head_sinks: mx.array | None
    ) -> mx.array:
        """As the cache attends; [B, Hq, L, Dv]."""
        return self._attend(queries, *self._arrays, scale)


class HandingCache:
    """A cache as one call of a model sees it: ``update_and_fetch`` hands out what is not an array.

    All else is the cache's own.
    """

    __slots__ = ("_cache", "_fetched")

    def __init__(self, cache: HeldKeys):
        self._cache = cache
        self._fetched: HandedKeys | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    @property
    def keys(self) -> mx.array:
        """Stands for the keys where mlx-lm's pipelines let them wait for what they send."""
        return mx.zeros(())

    @keys.setter
    def keys(self, waiting: mx.array) -> None:
        self._cache.wait_for(waiting)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[HandedKeys, Handed]:
        """Append keys [B, Hkv, L, D] and values [B, Hkv, L, Dv]; all of them, to be handed on."""
        if self._cache.attend is not None:
            self._fetched = _HandedProbe(self._cache.attend, keys, values)
        else:
            self._fetched = HandedView(self._cache.updates(keys, values), keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[HandedKeys, Handed]:
        """What was fetched in this call; layers that share keys and values ask for it."""
        if self._fetched is None:
            raise ValueError("[mlx_delta] a layer asks for shared keys before they are computed.")
        return self._fetched, self._fetched.values


@functools.wraps(_stock)
def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function of that name; keys that were handed through attend in their own way."""
    if not isinstance(keys, HandedKeys):
        return _stock(queries, keys, values, cache, scale, mask, sinks)
    if values is not keys.values:
        raise TypeError("the values attended to are not those of the keys")
    return keys.attend(queries, scale, mask, sinks)


def hook(model: nn.Module) -> None:
    """Let handed keys through, wherever the classes of a model call mlx-lm's attention.

    Nothing changes for other models of the same files. See :func:`unhook`.
    """
    for names in _namespaces(model):
        if names.get(NAME) is _stock:
            names[NAME] = scaled_dot_product_attention


def unhook(model: nn.Module) -> None:
    """Undo :func:`hook`, for all models of the same files."""
    for names in _namespaces(model):
        if names.get(NAME) is scaled_dot_product_attention:
            names[NAME] = _stock


def _namespaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The global names of every file that a model's classes are from, ``base.py`` left out."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    seen = {id(vars(base))}
    for cls in classes:
        for method in vars(cls).values():
            if isinstance(method, types.FunctionType) and id(method.__globals__) not in seen:
                seen.add(id(method.__globals__))
                yield method.__globals__
