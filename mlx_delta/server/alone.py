"""Requests one at a time: with a draft model, and where caches can't be batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate

from .job import Job
from .provider import caches_for
from .refusal import Refused
from .sampling import choose_processors, choose_sampler, probabilities
from .store import Prefixes


class _Gone(Exception):
    """The client went away, or the server is ending."""


def serve_alone(job: Job, provider: Any, prefixes: Prefixes, stops: Callable[[], bool]) -> None:
    """Answer one request, and keep its caches.

    Args:
        job: The request.
        provider: mlx-lm's, of the model and a draft model if there is one.
        prefixes: The store of caches.
        stops: Whether the server is ending.
    """
    args, prompt, flags = job.args, job.context.prompt, provider.cli_args
    model, draft, tokenizer = provider.model, provider.draft_model, provider.tokenizer
    processors = choose_processors(args)
    caches, known = None, 0
    if not processors:  # mlx-lm shows penalties only the part of a prompt that it is fed
        caches, known = prefixes.find(provider.model_key, prompt)
    if caches is None:
        caches = caches_for(provider, len(prompt))
    job.start(None, known)

    def report(done: int, total: int) -> None:
        if job.is_gone or stops():
            raise _Gone
        job.progress(done, total)

    tokens = list(prompt)
    pieces = stream_generate(
        model,
        tokenizer,
        mx.array(prompt[known:]),
        max_tokens=args.max_tokens,
        draft_model=draft,
        stream=mx.default_stream(mx.default_device()),
        sampler=choose_sampler(args, tokenizer),
        logits_processors=processors,
        prompt_cache=caches,
        num_draft_tokens=args.num_draft_tokens,
        prompt_progress_callback=report,
        prefill_step_size=flags.prefill_step_size,
        kv_bits=flags.kv_bits,
        kv_group_size=flags.kv_group_size,
        quantized_kv_start=flags.quantized_kv_start,
    )
    last: tuple[Any, ...] | None = None
    try:
        for piece in pieces:
            tokens.append(piece.token)
            if job.is_gone or stops():
                raise _Gone
            shown, reason = job.shown(piece.text, piece.finish_reason)
            said = (shown, piece.token, reason, *probabilities(args, piece.token, piece.logprobs))
            if reason is not None:
                last = said
                break
            job.say(*said)
    except _Gone:
        if stops():
            job.fail(Refused(503, "The server is shutting down."))
        else:
            job.leave()
        return
    finally:
        pieces.close()  # takes the draft's wrong guesses back
    layers = len(caches) if draft is None else len(model.layers)
    parts = [caches[:layers], caches[layers:]]
    prefixes.keep(provider.model_key, tokens, [part for part in parts if part])
    if last is not None:
        job.say(*last)
