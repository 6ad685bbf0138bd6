"""Samplers: mlx-lm's; with a seed, one that draws the same whatever else is generated beside it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.server import GenerationArguments
from mlx_lm.tokenizer_utils import TokenizerWrapper


def choose_sampler(
    args: GenerationArguments, tokenizer: TokenizerWrapper
) -> Callable[[mx.array], mx.array]:
    """The sampler that a request asks for."""
    asked = args.sampling
    sampler = make_sampler(
        asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        xtc_probability=asked.xtc_probability,
        xtc_threshold=asked.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    if args.seed is None or asked.temperature == 0:
        return sampler
    return Seeded(sampler, args.seed)


def choose_processors(args: GenerationArguments) -> list[Any]:
    """The changes to the logits that a request asks for."""
    asked = args.logits
    return make_logits_processors(
        asked.logit_bias,
        asked.repetition_penalty,
        asked.repetition_context_size,
        asked.presence_penalty,
        asked.presence_context_size,
        asked.frequency_penalty,
        asked.frequency_context_size,
    )


def probabilities(
    args: GenerationArguments, token: int, logprobs: mx.array
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's log probability, and the likeliest tokens with theirs, if they were asked for.

    Args:
        args: How a request is to be answered.
        token: The token.
        logprobs: Of all tokens, [V].
    """
    if not args.logprobs:
        return 0.0, ()
    top = mx.argsort(-logprobs)[: max(0, args.top_logprobs)]
    tokens: Any = top.tolist() if top.size else []
    values: Any = logprobs[top].tolist() if top.size else []
    own: Any = logprobs[token].item()
    return own, tuple(zip(tokens, values, strict=True))


class Seeded:
    """A sampler whose draws depend on a seed and on how many there were.

    mlx-lm's server seeds the one generator there is, so that it has to work on nothing else
    meanwhile. Here that generator is seeded anew for each draw, and afterwards by chance.

    Args:
        sampler: mlx-lm's.
        seed: From 0 to 2^64 - 1.
    """

    def __init__(self, sampler: Callable[[mx.array], mx.array], seed: int):
        self._sampler = sampler
        self._seed = seed
        self._draws = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw a token for each row of logprobs [B, V]."""
        name = f"{self._seed} {self._draws}".encode()
        mx.random.seed(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()))
        self._draws += 1
        try:
            return self._sampler(logprobs)
        finally:
            mx.random.seed(secrets.randbits(64))
