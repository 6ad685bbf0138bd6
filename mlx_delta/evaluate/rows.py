"""Scoring and generating token by token under a setting: one text at a time, or several together.

Nothing here knows of the harness. What a query sees is the setting's, whatever the batch: rows of
a batch agree with single texts up to float rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from mlx_delta.cache import DeltaKVCache
from mlx_delta.measure.settings import PREFILL_STEP, Setting, cache_nbytes
from mlx_delta.measure.sparsity import measure_sparsity

BUFFER_STEP = 256  # tokens by which mlx-lm's buffers and ours grow

Score = tuple[float, bool]  # log-likelihood of a text, and whether greedy decoding would write it
Cost = dict[str, Any]  # sparsities and bytes of one text


def can_batch(model: nn.Module, setting: Setting) -> bool:
    """Whether texts of different lengths can share a batch under a setting.

    Not where a cache has no batch twin (quantized, rotating, ``window-only``, sliding-window
    layers). Where the window is measured on each prompt (the paper's), each row has its own.
    """
    if setting.kv_bits is not None:
        return False
    delta = setting.delta
    if delta is not None and delta.block_fraction is not None:
        if delta.keyframes or delta.threshold_mode != "absolute":
            return False  # thresholds or runs depend on the block, and blocks on the row
    return all(type(c) in (KVCache, DeltaKVCache) for c in setting.make_caches(model))


def can_share(setting: Setting) -> bool:
    """Whether texts may go on from a prefix that was fed once: where cuts change nothing.

    A quantized cache is dense within a prompt's first chunk, and the paper's window depends on the
    whole prompt.
    """
    delta = setting.delta
    return setting.kind == "dense" or (
        setting.kind == "delta" and delta is not None and delta.block_fraction is None
    )


class Rows:
    """The caches of one text, or of several in a batch, and what they were fed.

    Args:
        model: The model.
        setting: How keys and values are kept.
        contexts: Token ids of each text's beginning; none is empty.
        batched: Run them together. Otherwise there may be one only.
        following: Tokens that belong to each prompt but come later; a setting whose window
            depends on the prompt's length counts them.
        shared: Caches of a prefix that each text goes on from, and its tokens; copied. Only for
            settings of which :func:`can_share` is true.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: Setting,
        contexts: list[list[int]],
        batched: bool,
        following: list[int] | None = None,
        shared: Sequence[tuple[list[Any], int]] | None = None,
    ):
        self._model, self._setting, self._batched = model, setting, batched
        totals = map(sum, zip(map(len, contexts), following or [0] * len(contexts), strict=True))
        if shared is None:
            singles = [setting.make_caches(model, total) for total in totals]
        else:
            singles = [copy.deepcopy(caches) for caches, _ in shared]
        self._caches = singles[0]
        if batched:
            layers = zip(*singles, strict=True)
            self._caches = [layer[0].merge(list(layer)) for layer in layers]
        self.lengths = [0] * len(contexts) if shared is None else [n for _, n in shared]
        self._capacity = 0  # tokens for which each row's buffers have room
        self.logits = self._prefill(contexts)

    def _prefill(self, contexts: list[list[int]]) -> mx.array:
        """Feed the contexts; logits [B, vocabulary] after each one's last token."""
        last: list[Any] = [None] * len(contexts)
        for start, logits in self._feed(contexts):
            for row, context in enumerate(contexts):
                if start < len(context) <= start + logits.shape[1]:
                    last[row] = logits[row, len(context) - 1 - start]
        return mx.stack(last)

    def _feed(self, tokens: list[list[int]]) -> Iterator[tuple[int, mx.array]]:
        """Feed tokens to every row, in chunks: where each begins, and its logits [B, L, V]."""
        longest = max(map(len, tokens))
        self._capacity = -(-(max(self.lengths) + longest) // BUFFER_STEP) * BUFFER_STEP
        step = max(BUFFER_STEP, PREFILL_STEP // len(tokens))
        padding = [longest - len(row) for row in tokens]
        padded = mx.array([row + [0] * pad for row, pad in zip(tokens, padding, strict=True)])
        if self._batched:
            for cache in self._caches:
                cache.prepare(lengths=[len(row) for row in tokens], right_padding=padding)
        for start in range(0, longest, step):
            if self._batched:
                logits = self._model(padded[:, start : start + step], cache=self._caches)
                mx.eval(logits, [cache.state for cache in self._caches])
            else:
                part = tokens[0][start : start + step]
                logits = self._setting.forward(self._model, part, self._caches)[None]
            yield start, logits
        if self._batched:
            for cache in self._caches:
                cache.finalize()
            mx.eval([cache.state for cache in self._caches])
        self.lengths = [n + len(row) for n, row in zip(self.lengths, tokens, strict=True)]

    def score(self, continuations: list[list[int]]) -> list[Score]:
        """Feed every row its continuation, and score it.

        Rows whose continuation is one token are scored by the logits that are there already; the
        last token of a continuation is not fed.
        """
        first = [_look_up(row, [c[0]]) for row, c in zip(self.logits, continuations, strict=True)]
        sums = [float(logprobs[0]) for logprobs, _ in first]
        greedy = [bool(ranked[0]) for _, ranked in first]
        if max(map(len, continuations)) > 1:
            for start, logits in self._feed([c[:-1] for c in continuations]):
                for row, continuation in enumerate(continuations):
                    targets = continuation[1 + start : 1 + start + logits.shape[1]]
                    logprobs, ranked = _look_up(logits[row, : len(targets)], targets)
                    sums[row] += float(logprobs.sum())
                    greedy[row] &= bool(ranked.all())
        return list(zip(sums, greedy, strict=True))

    def step(self, tokens: list[int]) -> None:
        """Feed one token to every row; ``logits`` follows."""
        for _, logits in self._feed([[token] for token in tokens]):
            self.logits = logits[:, -1]

    def take(self, rows: list[int]) -> Rows:
        """Copies of these rows, in this order; a row may be taken more than once."""
        taken = copy.copy(self)
        taken._caches = copy.deepcopy(self._caches)
        taken.keep(rows)
        return taken

    def keep(self, rows: list[int]) -> None:
        """Keep these rows only."""
        if self._batched:
            for cache in self._caches:
                cache.filter(mx.array(rows))
        self.logits = self.logits[mx.array(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def cost(self, row: int, prompt_tokens: int | None = None) -> Cost:
        """A row's sparsity, and the bytes of its cache: in a batch its share, by its length.

        Args:
            row: Which row.
            prompt_tokens: How many of its tokens were a prompt; all of them when not given.
        """
        length = self.lengths[row]
        prompt = length if prompt_tokens is None else prompt_tokens
        sparsity = measure_sparsity(self._caches, prompt, row)
        room = -(-length // BUFFER_STEP) * BUFFER_STEP
        nbytes = cache_nbytes(self._caches)
        if self._batched:
            nbytes = round(nbytes / len(self.lengths) * room / self._capacity)
        return {
            "prefill": sparsity.prefill,
            "decode": sparsity.decode if length > prompt else None,
            "overall": sparsity.overall,
            "bytes": nbytes,
        }


def _look_up(logits: mx.array, targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each target, and whether it ranks first; logits [L, V] or [V]."""
    if not targets:
        return np.zeros(0), np.ones(0, bool)
    logits = logits.reshape(len(targets), -1).astype(mx.float32)
    ids = mx.array(list(targets))
    chosen = mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    logprobs = np.array(chosen - mx.logsumexp(logits, axis=-1), np.float64)
    return logprobs, np.array(mx.argmax(logits, axis=-1) == ids)


def score_texts(
    model: nn.Module,
    setting: Setting,
    texts: list[tuple[list[int], list[list[int]]]],
    batch_size: int,
    batched: bool,
) -> list[list[tuple[Score, Cost]]]:
    """Log-likelihoods of continuations, each context being prefilled once.

    Args:
        model: The model.
        setting: How keys and values are kept.
        texts: Contexts, each with its continuations; neither is empty.
        batch_size: How many continuations may run together.
        batched: Whether texts may share a batch; otherwise there may be one only.

    Returns:
        For each context and continuation the score, and what its cache cost.
    """
    following = [max(map(len, continuations)) - 1 for _, continuations in texts]
    rows = Rows(model, setting, [context for context, _ in texts], batched, following)
    pairs = [(i, c) for i, (_, continuations) in enumerate(texts) for c in continuations]
    results: list[list[tuple[Score, Cost]]] = [[] for _ in texts]
    step = max(batch_size, len(texts)) if batched else 1
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        # Caches are copied only where another continuation still needs them.
        taken = rows.take([i for i, _ in part]) if len(pairs) > len(texts) else rows
        scores = taken.score([continuation for _, continuation in part])
        for row, (i, _) in enumerate(part):
            results[i].append((scores[row], taken.cost(row)))
    return results


def generate_texts(
    model: nn.Module,
    setting: Setting,
    prompts: list[list[int]],
    max_tokens: list[int],
    stopped: list[Callable[[list[int]], bool]],
    eos: set[int],
    sampler: Callable[[mx.array], mx.array] | None,
    batched: bool,
    shared: Sequence[tuple[list[Any], int]] | None = None,
) -> list[tuple[list[int], Cost]]:
    """Generate after every prompt.

    Args:
        model: The model.
        setting: How keys and values are kept.
        prompts: Token ids; none is empty.
        max_tokens: Each prompt's limit.
        stopped: For each prompt, whether it is done with these tokens.
        eos: Tokens that end a text; they are not part of it.
        sampler: From log-probabilities [B, vocabulary] to tokens [B]; greedy when not given.
        batched: Whether prompts may share a batch; otherwise there may be one only.
        shared: As for :class:`Rows`: prompts are what follows these prefixes.

    Returns:
        The tokens that each prompt led to, and what its cache cost.
    """
    rows = Rows(model, setting, prompts, batched, shared=shared)
    starts = [0] * len(prompts) if shared is None else [n for _, n in shared]
    active = list(range(len(prompts)))  # which prompt each row is of
    written: list[list[int]] = [[] for _ in prompts]
    costs: list[Cost] = [{} for _ in prompts]
    while True:
        tokens = _choose(rows.logits, sampler)
        keep = []
        for row, prompt in enumerate(active):
            if tokens[row] not in eos:
                written[prompt].append(tokens[row])
                full = len(written[prompt]) >= max_tokens[prompt]
                if not full and not stopped[prompt](written[prompt]):
                    keep.append(row)
                    continue
            costs[prompt] = rows.cost(row, starts[prompt] + len(prompts[prompt]))
        if not keep:
            return list(zip(written, costs, strict=True))
        if len(keep) < len(active):
            rows.keep(keep)
            active = [active[row] for row in keep]
        rows.step([tokens[row] for row in keep])


def _choose(logits: mx.array, sampler: Callable[[mx.array], mx.array] | None) -> list[int]:
    """The next token of every row."""
    if sampler is None:
        tokens = mx.argmax(logits, axis=-1)
    else:
        logits = logits.astype(mx.float32)
        tokens = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return [int(token) for token in np.array(tokens)]


def average_cost(costs: Iterable[Cost]) -> Cost:
    """The mean of several texts' costs; ``decode`` over those that decoded anything."""
    means: Cost = {}
    costs = list(costs)
    for name in ("prefill", "decode", "overall", "bytes"):
        values = [cost[name] for cost in costs if cost[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
