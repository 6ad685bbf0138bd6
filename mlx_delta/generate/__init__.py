"""Generating text: mlx-lm's generators, with caches and checks of our own.

The functions are here, the command line (``python -m mlx_delta.generate``) is beside it. A package
rather than a module, so that running it does not import it twice.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import batch_generate as mlx_lm_batch_generate
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import stream_generate as mlx_lm_stream_generate
from mlx_lm.generate import BatchResponse, GenerationResponse
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.cache.layout import text_length
from mlx_delta.models.anatomy import context_length
from mlx_delta.models.common import setting_of


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int],
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a complete response; mlx-lm's ``generate`` with this library's checks.

    Args:
        model: From :func:`mlx_delta.load`.
        tokenizer: From :func:`mlx_delta.load`.
        prompt: Text, or token ids.
        verbose: Print the text as it comes, then counts and speeds.
        **kwargs: As for :func:`stream_generate`.

    Returns:
        The text.

    Raises:
        ValueError: As for :func:`stream_generate`.
    """
    tokens = _prepare("generate", model, tokenizer, prompt, kwargs)
    return mlx_lm_generate(model, tokenizer, tokens, verbose=verbose, **kwargs)


def stream_generate(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: str | list[int] | mx.array, **kwargs: Any
) -> Generator[GenerationResponse, None, None]:
    """Generate a response piece by piece; mlx-lm's ``stream_generate`` with our checks.

    Args:
        model: From :func:`mlx_delta.load`.
        tokenizer: From :func:`mlx_delta.load`.
        prompt: Text, or token ids.
        **kwargs: mlx-lm's: ``max_tokens``, ``sampler``, ``prompt_cache``, ``draft_model`` ...

    Raises:
        ValueError: An empty prompt, one longer than the model's context, or an option that does
            not go together with the delta.
    """
    tokens = _prepare("stream_generate", model, tokenizer, prompt, kwargs)
    yield from mlx_lm_stream_generate(model, tokenizer, mx.array(tokens), **kwargs)


def batch_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[str] | list[list[int]],
    **kwargs: Any,
) -> BatchResponse:
    """Generate responses for several prompts at once; mlx-lm's ``batch_generate``.

    Args:
        model: From :func:`mlx_delta.load`.
        tokenizer: From :func:`mlx_delta.load`.
        prompts: Texts, or lists of token ids.
        **kwargs: mlx-lm's: ``max_tokens``, ``prompt_caches``, ``verbose`` ...

    Raises:
        ValueError: As for :func:`stream_generate`, for any of the prompts; or a setting whose
            window depends on the prompt's length.
    """
    name = "batch_generate"
    if not prompts:
        raise ValueError(f"[{name}] there are no prompts.")
    tokens = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        check_prompt(name, model, len(ids))
        tokens.append(ids)
    check_options(name, model, kwargs)
    delta = setting_of(model)
    if delta is not None and delta.block_fraction is not None:
        raise ValueError(
            f"[{name}] block_fraction (the paper's window) is measured on each prompt and can't be "
            "shared by a batch; give a fixed block_size, or generate one prompt at a time."
        )
    return mlx_lm_batch_generate(model, tokenizer, tokens, **kwargs)


def encode_prompt(tokenizer: TokenizerWrapper, prompt: str | list[int] | mx.array) -> list[int]:
    """Token ids of a prompt, as mlx-lm encodes it: with a BOS token unless it begins with one."""
    if isinstance(prompt, mx.array):
        return [int(token) for token in prompt]
    if not isinstance(prompt, str):
        return list(prompt)
    bos = tokenizer.bos_token
    add_special_tokens = bos is None or not prompt.startswith(bos)
    return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)


def check_prompt(name: str, model: nn.Module, prompt_tokens: int, cached_tokens: int = 0) -> None:
    """Refuse an empty prompt, and one longer than the model's context.

    Raises:
        ValueError: Either of these.
    """
    if not prompt_tokens:
        raise ValueError(f"[{name}] the prompt is empty; give at least one token.")
    context = context_length(model)
    if context is not None and prompt_tokens + cached_tokens > context:
        raise ValueError(
            f"[{name}] the prompt has {prompt_tokens + cached_tokens} tokens but the model's "
            f"context has {context}; shorten the prompt."
        )


def check_options(name: str, model: nn.Module, options: dict[str, Any]) -> None:
    """Refuse options of mlx-lm's that would silently do nothing to held keys.

    Raises:
        ValueError: One of these is given for a model with the delta on.
    """
    if setting_of(model) is None:
        return
    for option in ("max_kv_size", "kv_bits"):
        if options.get(option) is not None:
            raise ValueError(
                f"[{name}] {option}={options[option]} does not go together with the delta; leave "
                "it out, or load the model with delta=None (--no-delta)."
            )


def _prepare(
    name: str, model: nn.Module, tokenizer: TokenizerWrapper, prompt: Any, options: dict[str, Any]
) -> list[int]:
    """Check prompt and options; make the caches when the setting depends on the prompt."""
    tokens = encode_prompt(tokenizer, prompt)
    caches = options.get("prompt_cache")
    cached = text_length(caches or [])
    check_prompt(name, model, len(tokens), cached)
    check_options(name, model, options)
    if caches is None:
        options["prompt_cache"] = make_caches(model, len(tokens), options.get("max_kv_size"))
        if options.get("draft_model") is not None:
            options["prompt_cache"] += make_prompt_cache(options["draft_model"])
    return tokens


def make_caches(
    model: nn.Module, prompt_tokens: int | None = None, max_kv_size: int | None = None
) -> list[Any]:
    """New caches for a model.

    Args:
        model: From :func:`mlx_delta.load`.
        prompt_tokens: Length of the prompt, for settings that depend on it (the paper's).
        max_kv_size: For dense models only: keep this many tokens, the first 4 always. mlx-lm
            ignores it where a model makes its own caches; here it is honoured.
    """
    if setting_of(model) is not None:
        return model.make_cache(prompt_length=prompt_tokens)
    caches = make_prompt_cache(model, max_kv_size)
    if max_kv_size is not None:
        caches = [RotatingKVCache(max_kv_size, keep=4) if type(c) is KVCache else c for c in caches]
    return caches
