"""Whether a prompt's caches fit: MLX ends the process without a word when memory runs out."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.config import DeltaConfig
from mlx_delta.system.kv import kv_fields
from mlx_delta.system.memory import RESERVED, free_memory, show_bytes

_QUERIES = 128  # whose scores are in memory at one time, at least


def check_memory(
    name: str, model: nn.Module, tokens: int, options: dict[str, Any], first: bool = False
) -> None:
    """Refuse a text whose caches and scores are surely larger than the memory that is free.

    Args:
        name: Of the caller, for the message.
        model: The model, loaded.
        tokens: Of the text, without the answer.
        options: mlx-lm's.
        first: Whether this process has not computed anything yet.

    Raises:
        MemoryError: They are larger.
    """
    free, limit = free_memory(RESERVED if first else 0)
    if free < 0:
        raise MemoryError(
            f"[{name}] {limit} leaves no room to generate in; allow the process more memory."
        )
    if options.get("kv_bits") is not None or options.get("max_kv_size") is not None:
        return  # smaller than the estimate
    needed = estimate(model, tokens)
    if needed > free:
        smaller = estimate(model, tokens, DeltaConfig().changed(**kv_fields("small")))
        advice = f"--kv small ({show_bytes(smaller)}), " if smaller <= min(free, needed - 1) else ""
        raise MemoryError(
            f"[{name}] the caches of {tokens} tokens take {show_bytes(needed)} at least "
            f"but {limit} leaves {show_bytes(free)}; use {advice}a shorter prompt, a smaller "
            "window or a smaller model."
        )


def estimate(model: nn.Module, tokens: int, setting: DeltaConfig | None = None) -> int:
    """Bytes that caches and scores of a text take at least; 0 for a model of unknown form.

    Args:
        model: The model, loaded.
        tokens: Of the text.
        setting: Instead of the model's own.
    """
    args = getattr(model, "args", None)
    layers, hidden = getattr(args, "num_hidden_layers", 0), getattr(args, "hidden_size", 0)
    heads = getattr(args, "num_attention_heads", 0)
    if not all(isinstance(x, int) and x > 0 for x in (layers, hidden, heads)):
        return 0
    kv_heads = getattr(args, "num_key_value_heads", None) or heads
    head_dim = getattr(args, "head_dim", None) or hidden // heads
    item_size = 4 if mx.default_device() == mx.Device(mx.cpu) else 2
    delta = setting or getattr(args, "delta", None)
    key, value = item_size * head_dim, item_size * head_dim
    window = 0
    if delta is not None and delta.value_bits is not None:
        value = int(head_dim * delta.value_bits) // 8
    if delta is not None and delta.key_bits is not None:
        # What held keys take depends on the text; near keys have a room of their own.
        window, key = 2 * head_dim * (delta.window + 2 * delta.block_size), 0
        if delta.key_format == "codes":
            key = int(head_dim * delta.key_bits) // 8
    sliding = getattr(args, "sliding_window", None)
    if sliding:
        return 0  # some layers keep less: no lower bound
    caches = layers * kv_heads * (tokens * (key + value) + window)
    return caches + 4 * heads * min(tokens, _QUERIES) * tokens
