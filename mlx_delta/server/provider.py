"""The model, loaded once by this library, where mlx-lm's server looks for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import ModelProvider

from mlx_delta.cache import HeldKeys
from mlx_delta.cache.check_state import leaves
from mlx_delta.generate.command import choose_delta
from mlx_delta.loading import load
from mlx_delta.measure.text import context_length
from mlx_delta.models.anatomy import dense_caches
from mlx_delta.models.common import model_setting
from mlx_delta.prefixes import fingerprint
from mlx_delta.system.kv import advice

from .served import Served


class Provider(ModelProvider):
    """Loads with the delta, and only what the command line names: a request never loads anything.

    Args:
        args: The command line.
    """

    model_key: Any
    model: Any
    tokenizer: Any
    draft_model: Any

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        if self.is_distributed:
            raise ValueError("the server runs in one process; start it without mlx.launch.")

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        args = self.cli_args
        template = {k: v for k, v in self._tokenizer_config.items() if k != "trust_remote_code"}
        model, tokenizer = load(
            model_path,
            choose_delta(args, model_path),
            tokenizer_config=template,
            adapter_path=adapter_path,
            trust_remote_code=args.trust_remote_code,
        )
        draft = None
        if draft_model_path is not None:
            draft, other = load(draft_model_path, trust_remote_code=args.trust_remote_code)
            if other.vocab_size != tokenizer.vocab_size:
                raise ValueError(
                    f"--draft-model {draft_model_path} has {other.vocab_size} tokens but the model "
                    f"has {tokenizer.vocab_size}; they must share a tokenizer."
                )
        setting = model_setting(model)
        self.model_key = (model_path, adapter_path, draft_model_path)
        self.model, self.tokenizer, self.draft_model = model, tokenizer, draft
        # A window that is a share of a prompt has another size for each prompt.
        shares_blocks = setting is None or setting.block_fraction is None
        self.is_batchable = (
            draft is None
            and shares_blocks
            and all(hasattr(cache, "merge") for cache in make_prompt_cache(model))
        )


def check_options(provider: Provider, args: argparse.Namespace) -> None:
    """Refuse options that the model can't have.

    Raises:
        ValueError: One of these.
    """
    model, draft = provider.model, provider.draft_model
    if args.kv_bits is not None:
        if model_setting(model) is not None:
            raise ValueError(
                f"--kv-bits {args.kv_bits} does not go together with the delta; use {advice()}, or "
                "--no-delta."
            )
        if draft is not None:
            raise ValueError("--kv-bits and --draft-model do not go together; drop one.")
        if any(not hasattr(cache, "to_quantized") for cache in leaves(dense_caches(model))):
            raise ValueError("--kv-bits does not go together with this model's sliding windows.")
    most = _most_draft_tokens(provider)
    if draft is not None and most is not None and args.num_draft_tokens > most:
        raise ValueError(f"--num-draft-tokens must be <= {most} but got {args.num_draft_tokens}.")


def served_by(provider: Provider, args: argparse.Namespace) -> Served:
    """The model as requests see it, with the command line's limits."""
    model, tokenizer = provider.model, provider.tokenizer
    context = context_length(model)
    path = Path(args.model).expanduser()
    own = [path.resolve().name, args.model, str(path.resolve())] if path.is_dir() else [args.model]
    names = [name for name in (args.alias, *own) if name]
    return Served(
        names=tuple(dict.fromkeys(names)),
        context=context,
        vocabulary=getattr(getattr(model, "args", None), "vocab_size", None),
        longest_piece=max(map(len, tokenizer.get_vocab()), default=1),
        most_draft_tokens=_most_draft_tokens(provider),
        max_body=args.max_body,
        max_prompt=args.max_prompt_tokens,
        max_answer=args.max_answer_tokens or context or Served.max_answer,
        max_queue=args.max_queue,
        max_connections=args.max_connections,
        seconds=args.client_timeout,
        api_key=args.api_key,
        origins=tuple(args.allowed_origins),
        local_only=args.is_local,
    )


def caches_for(provider: Any, prompt_tokens: int) -> list[Any]:
    """New caches for a prompt of this length, on which a setting may depend: the draft's last."""
    models = [m for m in (provider.model, provider.draft_model) if m is not None]
    return [cache for model in models for cache in _new_caches(model, prompt_tokens)]


def _new_caches(model: Any, prompt_tokens: int) -> list[Any]:
    if model_setting(model) is not None:
        caches: list[Any] = model.make_cache(prompt_length=prompt_tokens)
        return caches
    return list(make_prompt_cache(model))


def fingerprint_of(provider: Provider, args: argparse.Namespace) -> str:
    """A name of all that makes caches what they are: models, settings, and how they are stored."""
    models = [m for m in (provider.model, provider.draft_model) if m is not None]
    packing = (args.kv_bits, args.kv_group_size, args.quantized_kv_start) if args.kv_bits else ()
    return fingerprint(models[0], *map(fingerprint, models[1:]), *packing)


def _most_draft_tokens(provider: Provider) -> int | None:
    """How many guesses can be taken back: at most a block of held keys."""
    models = [m for m in (provider.model, provider.draft_model) if m is not None]
    caches = [cache for model in models for cache in leaves(make_prompt_cache(model))]
    return min((c.config.block_size for c in caches if isinstance(c, HeldKeys)), default=None)
