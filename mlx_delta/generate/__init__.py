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

from mlx_delta.cache import DeltaKVCache
from mlx_delta.cache.check_state import length_of
from mlx_delta.cache.layout import map_caches, settle
from mlx_delta.models.anatomy import dense_caches
from mlx_delta.models.common import model_setting
from mlx_delta.system.thread_end import cleared_with_thread

from .checks import check_caches_fit, check_options, check_prompt, encode_prompt, limit_answer
from .memory import check_memory

MAX_TOKENS, BATCH_MAX_TOKENS = 256, 128  # mlx-lm's defaults


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
    text = mlx_lm_generate(model, tokenizer, tokens, verbose=verbose, **kwargs)
    settle(kwargs["prompt_cache"])
    return text


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
        MemoryError: The caches would not fit the memory that is free.
    """
    tokens = _prepare("stream_generate", model, tokenizer, prompt, kwargs)
    responses = mlx_lm_stream_generate(model, tokenizer, mx.array(tokens), **kwargs)
    return _settling(responses, kwargs["prompt_cache"])


def _settling(
    responses: Generator[GenerationResponse, None, None], caches: list[Any]
) -> Generator[GenerationResponse, None, None]:
    """The same responses; after the last one, or where they are left, the caches are computed.

    So that another thread can go on with them: no token that was drawn needed the last block's
    held keys or codes yet.
    """
    try:
        yield from responses
    except GeneratorExit:
        settle(caches)
        raise
    settle(caches)


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
    if not isinstance(prompts, (list, tuple)) or any(isinstance(p, int) for p in prompts):
        raise ValueError(
            f"[{name}] prompts must be a list of texts, or of lists of token ids, but got "
            f"{type(prompts).__name__}; for a single prompt give [prompt]."
        )
    if not prompts:
        raise ValueError(f"[{name}] there are no prompts.")
    check_options(name, model, kwargs)
    cleared_with_thread()
    delta = model_setting(model)
    if delta is not None and delta.block_fraction is not None:
        raise ValueError(
            f"[{name}] block_fraction (the paper's window) is measured on each prompt and can't be "
            "shared by a batch; give a fixed block_size, or generate one prompt at a time."
        )
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    size = kwargs.pop("max_kv_size", None) if delta is not None else None
    if size is not None:  # mlx-lm would ignore it
        before = _for_each(name, "prompt_caches", kwargs.get("prompt_caches"), tokens)
        pairs = zip(before, tokens, strict=True)
        made = [make_caches(model, len(ids), size) if c is None else c for c, ids in pairs]
        kwargs["prompt_caches"] = made
    caches = _for_each(name, "prompt_caches", kwargs.get("prompt_caches"), tokens)
    most = kwargs.get("max_tokens", BATCH_MAX_TOKENS)
    limits = _for_each(name, "max_tokens", most, tokens)
    for i, (ids, cache) in enumerate(zip(tokens, caches, strict=True)):
        check_prompt(name, model, ids, cache)
        if cache is not None:
            check_caches_fit(name, model, cache, kwargs)
        given = "max_tokens" in kwargs
        length = len(ids) + length_of(cache or [])
        limits[i] = limit_answer(name, model, length, limits[i], given)
    response = mlx_lm_batch_generate(model, tokenizer, tokens, **{**kwargs, "max_tokens": limits})
    settle(response.caches or [])
    return response


def _for_each(name: str, option: str, value: Any, prompts: list[list[int]]) -> list[Any]:
    """One value of an option for each prompt; a single one counts for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * len(prompts)
    if len(values) != len(prompts):
        raise ValueError(
            f"[{name}] {option} has {len(values)} values but there are {len(prompts)} prompts."
        )
    return values


def _prepare(
    name: str, model: nn.Module, tokenizer: TokenizerWrapper, prompt: Any, options: dict[str, Any]
) -> list[int]:
    """Check prompt and options; make the caches, whose setting may depend on the prompt."""
    tokens = encode_prompt(tokenizer, prompt)
    caches, draft = options.get("prompt_cache"), options.get("draft_model")
    check_prompt(name, model, tokens, caches)
    check_options(name, model, options)
    if caches is None:
        caches = make_caches(model, len(tokens), options.get("max_kv_size"))
    check_caches_fit(name, model, caches, options)
    if draft is not None and len(caches) == len(dense_caches(model)):
        caches = [*caches, *make_caches(draft, len(tokens))]
    options["prompt_cache"] = caches
    length = len(tokens) + length_of(caches)
    given = "max_tokens" in options
    most = options.get("max_tokens", MAX_TOKENS)
    options["max_tokens"] = limit_answer(name, model, length, most, given)
    check_memory(name, model, length, options)
    cleared_with_thread()
    return tokens


def make_caches(
    model: nn.Module, prompt_tokens: int | None = None, max_kv_size: int | None = None
) -> list[Any]:
    """New caches for a model.

    Args:
        model: From :func:`mlx_delta.load`.
        prompt_tokens: Length of the prompt, for settings that depend on it (the paper's).
        max_kv_size: Keep this many tokens, the first always: 4 of them, or with the delta a block.
            mlx-lm ignores it where a model makes its own caches; here it is honoured.

    Raises:
        ValueError: It is too small for the setting.
    """
    if model_setting(model) is not None:
        caches = model.make_cache(prompt_length=prompt_tokens)
        if max_kv_size is None:
            return caches
        return map_caches(caches, lambda cache, _: bounded(cache, max_kv_size))
    caches = make_prompt_cache(model, max_kv_size)
    if max_kv_size is not None:
        caches = [RotatingKVCache(max_kv_size, keep=4) if type(c) is KVCache else c for c in caches]
    return caches


def bounded(cache: Any, max_size: int) -> Any:
    """A new cache in place of one of held keys, that keeps so many tokens."""
    if not isinstance(cache, DeltaKVCache):
        return cache
    made = DeltaKVCache(cache.config.changed(max_size=max_size))
    made.prompt_length = cache.prompt_length
    return made
