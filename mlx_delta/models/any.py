"""The delta for any model of mlx-lm's with ordinary keys and values.

:func:`apply` gives a model a subclass of its own class, which makes our caches where mlx-lm would
make a ``KVCache``, and shows them to the layers through
:class:`~mlx_delta.attention.handed.HandingCache`. Layers with windows, chunks or recurrent states
keep mlx-lm's caches, and with them their own attention. Weights, submodules and their names stay
as they are, so quantized models, adapters and everything that finds layers by their paths work.
"""

from __future__ import annotations

import copy
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from mlx_delta.attention.handed import HandingCache
from mlx_delta.cache import DeltaKVCache, HeldKeys
from mlx_delta.cache.check_state import leaves
from mlx_delta.cache.layout import map_caches, replace_ordinary
from mlx_delta.config import DeltaConfig

from .anatomy import NotHanded, dense_caches, trace_heads
from .common import model_setting
from .parts import of_own_layers, own_part
from .queries import query_sensitivities
from .sharing import share_heads


def apply(model: nn.Module, config: DeltaConfig | None = None, tokenizer: Any = None) -> nn.Module:
    """Let a model attend with the delta, also when it is given no cache.

    Args:
        model: Any of mlx-lm's, or of a module that calls mlx-lm's
            ``scaled_dot_product_attention``; changed in place. Applied again, the new setting
            takes the place of the old one.
        config: The setting; the default one when not given. Thresholds of layers are one for
            each cache that the model makes.
        tokenizer: The model's. With it a setting that weighs the channels of keys and has no
            sensitivities gets some from the queries of a short text, as in :func:`load`; without
            it all channels weigh the same.

    Returns:
        The model.

    Raises:
        ValueError: The model has no layer with ordinary keys and values, computes with cached
            keys itself (latent attention, capped scores), or has the delta built in; or the
            setting does not fit its layers.
    """
    config = config or DeltaConfig()
    if not isinstance(config, DeltaConfig):
        raise ValueError(f"[apply] config must be a DeltaConfig but got {config!r}.")
    if _has_built_in(model):
        raise ValueError(
            f"[apply] this {_name(model)} has the delta built in; load it with another setting."
        )
    check_layers(model, config)
    if not isinstance(model, AnyDelta):
        arguments = _arguments(model)
        model.__class__ = _with_delta(type(model))
        model._dense_arguments = arguments
    model.args = copy.copy(_arguments(model))  # another model may share them
    model.args.delta = config
    if tokenizer is not None and config.cuts_runs and config.sensitivities is None:
        found = query_sensitivities(model, tokenizer, config)
        model.args.delta = config.changed(sensitivities=found)
    return model


def attend_with(model: nn.Module, config: DeltaConfig) -> None:
    """Apply the delta to a model, or check the setting that it was built with.

    Raises:
        ValueError: As for :func:`apply`.
    """
    if _has_built_in(model):
        check_layers(model, config)
    else:
        apply(model, config)


def remove(model: nn.Module) -> nn.Module:
    """Undo :func:`apply`: the model is mlx-lm's again.

    Its files keep the entrance that :func:`~mlx_delta.attention.handed.hook` made, for the sake
    of other models; :func:`~mlx_delta.attention.handed.unhook` closes it.

    Raises:
        ValueError: The delta was not applied to it.
    """
    if not isinstance(model, AnyDelta):
        raise ValueError("[remove] the delta was not applied to this model.")
    if isinstance(model._dense_arguments, _NoArguments):
        del model.args
    else:
        model.args = model._dense_arguments
    del model._dense_arguments
    model.__class__ = type(model).__mro__[2]
    return model


class AnyDelta(nn.Module):
    """What a model with the delta does beside what its own class does."""

    args: Any
    _dense_arguments: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; without caches it makes them."""
        position = _cache_position(type(self).__mro__[2])
        given = args[position] if position < len(args) else kwargs.get("cache")
        if given is None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            given = self.make_cache(prompt_length=inputs.shape[1])
        handed = _handed(given)
        if position < len(args):
            args = (*args[:position], handed, *args[position + 1 :])
        else:
            kwargs["cache"] = handed
        return super().__call__(*args, **kwargs)

    def make_cache(self, prompt_length: int | None = None) -> list[Any]:
        """New caches, ours for ordinary keys and values.

        Args:
            prompt_length: Length of the prompt, for settings that depend on it.
        """
        config = self.args.delta
        if prompt_length is not None:
            config = config.resolve(prompt_length)
        caches = make_own_caches(self, super())
        config = of_own_layers(config, own_part(self), len(caches))
        return replace_ordinary(caches, lambda i: DeltaKVCache(config.for_layer(i, len(caches))))


def make_own_caches(model: nn.Module, base: Any) -> list[Any]:
    """New caches as the class of a model's makes them; mlx-lm's default for one that doesn't."""
    if hasattr(base, "make_cache"):
        return base.make_cache()
    return [KVCache() for _ in model.layers]


def check_layers(model: nn.Module, config: DeltaConfig) -> None:
    """Refuse a model without ordinary layers, and a setting that does not fit them.

    Raises:
        ValueError: One of these.
    """
    try:
        heads = iter(trace_heads(model))
    except NotHanded as error:
        raise ValueError(f"[apply] {_name(model)} {_why_not(model)} ({error}).") from error
    caches = dense_caches(model)
    ordinary = 0
    for i, cache in enumerate(caches):
        own = config.for_layer(i, len(caches))
        for inner in leaves([cache]):
            found = next(heads)
            if type(inner) is KVCache and found is not None:
                own.check_heads(found.kv_heads, i)
                ordinary += 1
    if not ordinary:
        kinds = sorted({type(cache).__name__ for cache in leaves(caches)})
        raise ValueError(
            f"[apply] {_name(model)} has no layer with ordinary keys and values, only "
            f"{' and '.join(kinds)}."
        )


def _name(model: nn.Module) -> str:
    return getattr(model, "model_type", None) or type(model).__name__


def _has_built_in(model: nn.Module) -> bool:
    """Whether a model was built with a setting."""
    return model_setting(model) is not None and not isinstance(model, AnyDelta)


def _why_not(model: nn.Module) -> str:
    """What a model does instead of handing keys on."""
    if any(hasattr(module, "kv_lora_rank") for module in model.modules()):
        return "caches latents instead of keys (multi-head latent attention), which can't be held"
    return "computes with cached keys in code of its own, which can't take held ones"


def _handed(caches: Any) -> list[Any]:
    """The caches as the layers see them."""
    return map_caches(
        caches, lambda cache, _: HandingCache(cache) if isinstance(cache, HeldKeys) else cache
    )


@functools.cache
def _with_delta(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the delta, under the same name."""
    names: dict[str, Any] = {"__module__": cls.__module__}
    if hasattr(cls, "shard"):  # mlx-lm asks for it before it splits a model

        def shard(self: Any, group: Any = None) -> None:
            share_heads(self, lambda own: cls.shard(self, own), group)

        names["shard"] = shard
    return type(cls.__name__, (AnyDelta, cls), names)


@functools.cache
def _cache_position(cls: type[nn.Module]) -> int:
    """Which positional argument, counted after ``self``, a model takes its caches in."""
    parameters = inspect.signature(cls.__call__).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return names.index("cache") - 1 if "cache" in names else len(names)


class _NoArguments(SimpleNamespace):
    """Stands in for the arguments of a model that does not keep them."""


def _arguments(model: nn.Module) -> Any:
    """A model's arguments."""
    return getattr(model, "args", None) or _NoArguments()
