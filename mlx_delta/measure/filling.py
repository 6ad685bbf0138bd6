"""Filling caches with a text as mlx-lm's generation does, and what that takes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_delta.models.anatomy import context_length, trace_heads
from mlx_delta.system.devices import has_gpu

from .settings import PREFILL_STEP, Setting

# ``import mlx_lm.generate`` would give the function of that name.
_mlx_lm = importlib.import_module("mlx_lm.generate")


def prefill(
    model: nn.Module,
    setting: Setting,
    prompt: Sequence[int],
    caches: list[Any],
    prefill_step: int = PREFILL_STEP,
) -> None:
    """Feed a prompt, or more of one, to caches, as mlx-lm does for a user."""
    for _ in generation_steps(model, setting, mx.array(list(prompt)), caches, 0, prefill_step):
        pass
    mx.eval([cache.state for cache in caches])


def generation_steps(
    model: nn.Module,
    setting: Setting,
    prompt: mx.array,
    caches: list[Any],
    generated: int,
    prefill_step: int,
) -> Any:
    """mlx-lm's own generation of so many tokens, to be iterated over."""
    return _mlx_lm.generate_step(
        prompt,
        model,
        max_tokens=generated,
        prompt_cache=caches,
        prefill_step_size=prefill_step,
        kv_bits=setting.kv_bits,
        quantized_kv_start=0,
    )


def check_context(name: str, model: nn.Module, context: int) -> None:
    """Refuse a context longer than the model's.

    Raises:
        ValueError: It is.
    """
    limit = context_length(model)
    if limit is not None and context > limit:
        raise ValueError(
            f"[{name}] a context of {context} tokens is longer than the model's, which is {limit}."
        )


def memory_needed(model: nn.Module, setting: Setting, context: int, prefill_step: int) -> int:
    """About the bytes that a run takes at most: weights, caches and scores.

    Where attention is not fused (without a GPU, and in mlx-lm's quantized caches) a chunk of
    queries writes its scores, and their softmax, for every key.
    """
    parameters: Any = tree_flatten(model.parameters())
    weights = sum(weight.nbytes for _, weight in parameters)
    item = 2 if has_gpu() else 4
    layers = [layer for layer in trace_heads(model) if layer is not None]
    heads = max((layer.queries for layer in layers), default=0)
    token = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers) * item
    kept = context if setting.max_size is None else min(context, setting.max_size + prefill_step)
    # While a cache grows, the old buffers are there beside the new ones; so are stored keys and
    # what they are made from.
    caches = 2 * kept * token
    fused = has_gpu() and setting.kv_bits is None
    scores = 0 if fused else 2 * heads * min(prefill_step, context) * kept * item
    return weights + caches + scores
