"""What is checked before any token is fed: prompts, options, and caches from elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.cache import HeldKeys
from mlx_delta.cache.check_state import leaves, length_of
from mlx_delta.measure.text import context_length
from mlx_delta.models.anatomy import dense_caches
from mlx_delta.models.common import model_setting
from mlx_delta.system.kv import advice


def encode_prompt(tokenizer: TokenizerWrapper, prompt: Any) -> list[int]:
    """Token ids of a prompt, as mlx-lm encodes it: with a BOS token unless it begins with one.

    Args:
        tokenizer: From :func:`mlx_delta.load`.
        prompt: Text, or token ids in a list or an array.

    Raises:
        ValueError: It is neither text nor whole numbers.
    """
    if isinstance(prompt, mx.array):
        if prompt.ndim != 1:
            raise ValueError(
                f"[encode_prompt] token ids must have one dimension but got {prompt.ndim}."
            )
        prompt = prompt.tolist()
    if not isinstance(prompt, str):
        wrong = [token for token in prompt if type(token) is not int]
        if wrong:
            raise ValueError(
                f"[encode_prompt] a prompt is a text or whole numbers but has {wrong[0]!r:.40}."
            )
        return list(prompt)
    bos = tokenizer.bos_token
    add_special_tokens = bos is None or not prompt.startswith(bos)
    return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)


def check_prompt(
    name: str, model: nn.Module, prompt: Sequence[int], caches: Sequence[Any] | None = None
) -> None:
    """Refuse an empty prompt, one longer than the model's context, and tokens it does not have.

    Args:
        name: Of the caller, for the message.
        model: The model.
        prompt: Token ids.
        caches: What they follow on.

    Raises:
        ValueError: One of these.
    """
    if not len(prompt):
        raise ValueError(f"[{name}] the prompt is empty; give at least one token.")
    cached = length_of(caches or [])
    context = context_length(model)
    if context is not None and len(prompt) + cached > context:
        raise ValueError(
            f"[{name}] the prompt has {len(prompt) + cached} tokens but the model's "
            f"context has {context}; shorten the prompt."
        )
    vocabulary = getattr(getattr(model, "args", None), "vocab_size", None)
    if vocabulary is not None and not 0 <= min(prompt) <= max(prompt) < vocabulary:
        wrong = next(token for token in prompt if not 0 <= token < vocabulary)
        raise ValueError(f"[{name}] the model has tokens 0 to {vocabulary - 1} but got {wrong}.")


def check_options(name: str, model: nn.Module, options: dict[str, Any]) -> None:
    """Refuse options of mlx-lm's that would silently do nothing, or fail on the way.

    Raises:
        ValueError: One of these is given for a model with the delta on, or two of them at once.
    """
    given = [o for o in ("max_kv_size", "kv_bits") if options.get(o) is not None]
    if model_setting(model) is not None and "kv_bits" in given:
        raise ValueError(
            f"[{name}] kv_bits={options['kv_bits']} does not go together with the delta; use "
            f"{advice()}, or load the model with delta=None (--no-delta)."
        )
    if len(given) == 2:
        raise ValueError(
            f"[{name}] max_kv_size={options['max_kv_size']} and kv_bits={options['kv_bits']} do "
            "not go together: mlx-lm can't quantize a cache that drops tokens; leave one out."
        )
    head_dim, group = (
        getattr(getattr(model, "args", None), "head_dim", None),
        options.get("kv_group_size", 64),
    )
    if "kv_bits" in given and head_dim is not None and head_dim % group:
        raise ValueError(
            f"[{name}] kv_bits={options['kv_bits']} needs a kv_group_size that divides the "
            f"model's head dimension of {head_dim} but got {group}."
        )
    if "max_kv_size" in given and options.get("draft_model") is not None:
        raise ValueError(
            f"[{name}] max_kv_size={options['max_kv_size']} does not go together with a draft "
            "model: a cache that drops tokens can't be rewound."
        )


def check_caches_fit(
    name: str, model: nn.Module, caches: Sequence[Any], options: dict[str, Any]
) -> None:
    """Refuse caches that are not one for each layer, or that an option can't work with.

    Args:
        name: Of the caller, for the message.
        model: The model.
        caches: Its caches; those of a draft model may follow.
        options: mlx-lm's.

    Raises:
        ValueError: One of these.
    """
    layers, draft = len(dense_caches(model)), options.get("draft_model")
    wanted = [layers] if draft is None else [layers, layers + len(dense_caches(draft))]
    if len(caches) not in wanted:
        raise ValueError(
            f"[{name}] the prompt cache has {len(caches)} layers but the model has {wanted[-1]}."
        )
    sliding = [
        c
        for c in leaves(caches)
        if isinstance(c, RotatingKVCache)
        or (isinstance(c, HeldKeys) and c.config.max_size is not None)
    ]
    if sliding and options.get("kv_bits") is not None:
        raise ValueError(
            f"[{name}] kv_bits={options['kv_bits']} does not go together with caches that drop "
            "tokens (sliding windows, max_kv_size): mlx-lm can't quantize them."
        )
    if sliding and draft is not None:
        raise ValueError(
            f"[{name}] a draft model does not go together with caches that drop tokens (sliding "
            "windows, max_kv_size): they can't be rewound."
        )
    steps = options.get("num_draft_tokens", 2)
    blocks = [c.config.block_size for c in leaves(caches[:layers]) if isinstance(c, HeldKeys)]
    if draft is not None and not 1 <= steps <= min(blocks, default=steps):
        most = f" and at most a block ({min(blocks)})" if blocks and steps > 0 else ""
        raise ValueError(f"[{name}] num_draft_tokens must be >= 1{most} but got {steps}.")


def room_for_answer(
    model: nn.Module, prompt_tokens: int, max_tokens: int
) -> tuple[int, str | None]:
    """How many tokens of an answer fit the model's context; at least the one after the prompt.

    Args:
        model: The model.
        prompt_tokens: Tokens before the answer.
        max_tokens: How many are asked for; -1 for as many as there are.

    Returns:
        The number, and what to say if it is less than what was asked for.
    """
    context = context_length(model)
    if context is None:
        return max_tokens, None
    room = max(1, context - prompt_tokens)
    if 0 < max_tokens <= room:
        return max_tokens, None
    fit = "1 token fits" if room == 1 else f"{room} tokens fit"
    return room, f"at most {fit} the model's context of {context} after the prompt"


def limit_answer(
    name: str, model: nn.Module, prompt_tokens: int, max_tokens: Any, given: bool
) -> int:
    """``max_tokens``, or as many of them as fit the context, with a warning if it was given.

    Raises:
        ValueError: It is no such number.
    """
    if type(max_tokens) is not int or max_tokens == 0 or max_tokens < -1:
        raise ValueError(f"[{name}] max_tokens must be positive (or -1) but got {max_tokens!r}.")
    room, note = room_for_answer(model, prompt_tokens, max_tokens)
    if note is not None and given and max_tokens > 0:
        warnings.warn(f"[{name}] max_tokens={max_tokens}: {note}.", stacklevel=4)
    return room
