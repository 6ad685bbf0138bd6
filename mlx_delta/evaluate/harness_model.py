"""A model under a setting as lm-evaluation-harness sees it."""

from __future__ import annotations

import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from lm_eval.api.model import TemplateLM, hash_args
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS, DEFAULT_MAX_LENGTH
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from mlx_delta.measure.settings import Setting
from mlx_delta.models.anatomy import context_length

from .rows import Cost, Score, average_cost, can_batch, generate_texts, score_texts


@dataclass(frozen=True)
class Pair:
    """A continuation to be scored after a context, both as token ids."""

    key: str
    args: tuple[str, str]
    context: tuple[int, ...]
    continuation: list[int]


@dataclass(frozen=True)
class Prompt:
    """A prompt to be continued."""

    key: str
    args: tuple[str, dict[str, Any]]
    tokens: list[int]
    until: list[str]
    max_tokens: int
    sampling: dict[str, Any]  # options of mlx-lm's make_sampler; empty: greedy


class HarnessModel(TemplateLM):
    """Answers the harness's requests under one setting.

    Log-likelihoods prefill each context once, however many continuations it has. Prompts beyond
    the model's context are cut on the left, as the harness's own models do.

    Args:
        model: The model.
        tokenizer: mlx-lm's wrapper.
        setting: How keys and values are kept.
        name: For the progress bar.
        batch_size: Requests that may run together.
        max_gen_toks: Tokens to generate at most, whatever the task says; ``None``: as it says.
        seed: Of requests that ask for sampling. Each has its own random numbers, drawn by its
            key, so that neither batches nor resuming change an answer.
        done: Answers so far, by key; answers are added.
        save: Called after every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        setting: Setting,
        name: str,
        batch_size: int,
        max_gen_toks: int | None,
        seed: int,
        done: dict[str, Any],
        save: Callable[[], None],
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.costs: dict[str, Cost] = {}  # by key, of this run's requests
        self._model, self._setting, self._name = model, setting, name
        self._max_gen_toks, self._seed = max_gen_toks, seed
        self._done, self._save = done.setdefault("answers", {}), save
        self._cut: set[tuple[int, ...]] = set()  # prompts that did not fit
        self._batched = batch_size > 1 and can_batch(model, setting)
        self._batch_size = batch_size if self._batched else 1
        if batch_size > 1 and not self._batched:
            print(
                f"note: requests run one at a time under {setting.name!r}, whose caches can't "
                "share a batch.",
                file=sys.stderr,
            )

    # What the harness asks about the model.

    @property
    def max_length(self) -> int:
        """Tokens that fit the model's context; the harness's default where it does not say."""
        return context_length(self._model) or DEFAULT_MAX_LENGTH

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or else EOS.

        Raises:
            ValueError: The tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError(
            f"[evaluate] the tokenizer of {self._name} has neither a BOS nor an EOS token to stand "
            "before texts without context."
        )

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's own caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as one prompt."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with a BOS token if the tokenizer adds one, unless there is one already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    # Log-likelihoods.

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Score]:
        pairs = []
        for args, context, continuation in requests:
            key = hash_args("loglikelihood", args)
            fitting = self._fit(context or [self.prefix_token_id], continuation)
            pairs.append(Pair(key, args, fitting, continuation))
            if not continuation:
                self._keep(key, [0.0, True], average_cost([]))
        by_context: dict[tuple[int, ...], dict[str, Pair]] = defaultdict(dict)
        for pair in pairs:
            if pair.key not in self._done:
                by_context[pair.context][pair.key] = pair
        # Texts of like lengths share a batch; the longest first, so that memory ends at once if
        # it does not suffice.
        groups = sorted((list(group.values()) for group in by_context.values()), key=_descending)
        finished = len(pairs) - sum(map(len, groups))
        with self._progress("scoring", len(pairs), finished) as bar:
            for texts in self._batches(groups):
                scored = self._score([(t[0].context, [p.continuation for p in t]) for t in texts])
                for text, scores in zip(texts, scored, strict=True):
                    for pair, (score, cost) in zip(text, scores, strict=True):
                        self._keep(pair.key, list(score), cost)
                        self.cache_hook.add_partial("loglikelihood", pair.args, score)
                        bar.update()
                self._save()
        self._report_cut()
        answers = [self._answer(pair.key) for pair in pairs]
        return [(float(logprob), bool(greedy)) for logprob, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each after BOS (or else EOS).

        A text beyond the model's context is cut into windows as the harness does: each predicts as
        many tokens as fit, the last one with a full context.
        """
        keys = [hash_args("loglikelihood_rolling", request.args) for request in requests]
        missing = {
            key: r.args for key, r in zip(keys, requests, strict=True) if key not in self._done
        }
        with self._progress("scoring", len(keys), len(keys) - len(missing)) as bar:
            for key, args in missing.items():
                windows = get_rolling_token_windows(
                    self.tok_encode(args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                total, costs = 0.0, []
                for batch in self._batches([make_disjoint_window(window) for window in windows]):
                    for [(score, cost)] in self._score([(c, [target]) for c, target in batch]):
                        total += score[0]
                        costs.append(cost)
                self._keep(key, total, average_cost(costs))
                self.cache_hook.add_partial("loglikelihood_rolling", args, total)
                self._save()
                bar.update()
        return [float(self._answer(key)) for key in keys]

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Cut a context on the left so that it leaves room; the last token is never fed."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"[evaluate] a continuation of {self._name} has {len(continuation)} tokens but "
                f"the model's context has {self.max_length}."
            )
        if len(context) > room:
            self._cut.add(tuple(context))
        return tuple(context[-room:])

    def _score(
        self, texts: list[tuple[Iterable[int], list[list[int]]]]
    ) -> list[list[tuple[Score, Cost]]]:
        listed = [(list(context), continuations) for context, continuations in texts]
        return score_texts(self._model, self._setting, listed, self._batch_size, self._batched)

    # Generation.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow prompts, up to a stop string, EOS or the limit of tokens."""
        prompts = self._prompts([request.args for request in requests])
        missing = {prompt.key: prompt for prompt in prompts if prompt.key not in self._done}
        todo = sorted(missing.values(), key=lambda p: (bool(p.sampling), -len(p.tokens)))
        greedy = [prompt for prompt in todo if not prompt.sampling]
        batches = [*self._batches(greedy), *([prompt] for prompt in todo[len(greedy) :])]
        with self._progress("generating", len(prompts), len(prompts) - len(missing)) as bar:
            for batch in batches:
                for prompt, (text, cost) in zip(batch, self._generate(batch), strict=True):
                    self._keep(prompt.key, text, cost)
                    self.cache_hook.add_partial("generate_until", prompt.args, text)
                    bar.update()
                self._save()
        self._report_cut()
        return [self._answer(prompt.key) for prompt in prompts]

    def _prompts(self, requests: list[tuple[str, dict[str, Any]]]) -> list[Prompt]:
        """Requests as they will be carried out."""
        repeats: Counter[str] = Counter()
        prompts = []
        for context, options in requests:
            kwargs = normalize_gen_kwargs(options, DEFAULT_MAX_GEN_TOKS)
            max_tokens = self._max_gen_toks or kwargs["max_gen_toks"]
            until = [stop for stop in kwargs["until"] if stop]
            sampling = {}
            if kwargs["do_sample"] and kwargs.get("temperature", 1.0) > 0:
                sampling = {
                    "temp": kwargs.get("temperature", 1.0),
                    "top_p": kwargs.get("top_p", 0.0),
                    "top_k": kwargs.get("top_k", 0),
                    "min_p": kwargs.get("min_p", 0.0),
                }
            key = hash_args("generate_until", (context, until, max_tokens, sampling, self._seed))
            repeats[key] += 1
            if sampling and repeats[key] > 1:
                key += f"-{repeats[key]}"  # a repeated request wants another sample
            room = self.max_length - max_tokens
            if room < 1:
                raise ValueError(
                    f"[evaluate] {self._name} generates up to {max_tokens} tokens, which leaves no "
                    f"room in the model's context of {self.max_length}; give --max-gen-toks."
                )
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            if len(tokens) > room:
                self._cut.add(tuple(tokens))
            args = (context, options)
            prompts.append(Prompt(key, args, tokens[-room:], until, max_tokens, sampling))
        return prompts

    def _generate(self, prompts: list[Prompt]) -> list[tuple[str, Cost]]:
        """The texts of a batch of prompts; of one, if it samples."""
        sampler = None
        if prompts[0].sampling:
            mx.random.seed(zlib.crc32(prompts[0].key.encode()))
            sampler = make_sampler(**prompts[0].sampling)
        written = generate_texts(
            self._model,
            self._setting,
            [prompt.tokens for prompt in prompts],
            [prompt.max_tokens for prompt in prompts],
            [self._stopper(prompt.until) for prompt in prompts],
            set(self.tokenizer.eos_token_ids),
            sampler,
            self._batched,
        )
        return [
            (_before(self._text(tokens), prompt.until), cost)
            for prompt, (tokens, cost) in zip(prompts, written, strict=True)
        ]

    def _stopper(self, until: list[str]) -> Callable[[list[int]], bool]:
        return lambda tokens: any(stop in self._text(tokens) for stop in until)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    # What both share.

    def _batches(self, items: list[Any]) -> list[list[Any]]:
        size = self._batch_size
        return [items[i : i + size] for i in range(0, len(items), size)]

    def _keep(self, key: str, answer: Any, cost: Cost) -> None:
        self._done[key] = {"answer": answer, "cost": cost}

    def _answer(self, key: str) -> Any:
        """A finished request's answer; from now on its cost counts."""
        self.costs[key] = self._done[key]["cost"]
        return self._done[key]["answer"]

    def _progress(self, what: str, total: int, finished: int) -> tqdm:
        label = f"{self._name}, {self._setting.name}: {what}"
        return tqdm(total=total, initial=finished, desc=label, disable=finished == total)

    def _report_cut(self) -> None:
        if self._cut:
            print(
                f"note: {len(self._cut)} prompts of {self._name} were cut on the left to fit the "
                f"model's context of {self.max_length} tokens.",
                file=sys.stderr,
            )
        self._cut.clear()


def _descending(pairs: list[Pair]) -> int:
    """Sorts groups of a shared context by its length."""
    return -len(pairs[0].context)


def _before(text: str, until: list[str]) -> str:
    """The text before the first of these strings."""
    return text[: min((i for stop in until if (i := text.find(stop)) >= 0), default=len(text))]
