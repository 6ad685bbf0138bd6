"""Whether a prompt has room: in the context, and in memory."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx

from mlx_delta.generate.memory import check_memory
from mlx_delta.system.memory import free_memory

from .refusal import NO_MEMORY, Refused
from .served import Served
from .store import Prefixes

LOOK_EVERY = 16  # steps between two looks at the memory
_LEAST_FREE = 64 << 20  # bytes that the steps until the next look may take


def check_prompt(prompt: list[int], served: Served, provider: Any) -> None:
    """Refuse a prompt that is empty, too long, or whose caches are surely larger than the memory.

    Raises:
        Refused: It is.
    """
    if not prompt:
        raise Refused(400, "The prompt is empty; give at least one token.", param="prompt")
    longest = served.longest_prompt
    if longest is not None and len(prompt) > longest:
        bound = "the model's context has"
        if longest != served.context:
            bound = "the server's limit (--max-prompt-tokens) is"
        raise Refused(
            400,
            f"The prompt has {len(prompt)} tokens but {bound} {longest}; shorten it.",
            code="context_length_exceeded",
        )
    try:
        check_memory("server", provider.model, len(prompt), {"kv_bits": provider.cli_args.kv_bits})
    except MemoryError as error:
        message = str(error).removeprefix("[server] ")
        raise Refused(503, f"No memory is left: {message}", code=NO_MEMORY) from error


def is_short_of_memory(prefixes: Prefixes) -> bool:
    """Whether the memory is about to end, after kept caches and spare buffers were let go."""
    if free_memory(0)[0] >= _LEAST_FREE:
        return False
    prefixes.shrink()
    gc.collect()
    mx.clear_cache()
    return free_memory(0)[0] < _LEAST_FREE
