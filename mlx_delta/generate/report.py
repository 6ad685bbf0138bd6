"""What ``python -m mlx_delta.generate`` says about a text it generated."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.cache import HeldKeys
from mlx_delta.cache.check_state import leaves
from mlx_delta.config import DeltaConfig
from mlx_delta.measure.settings import scratch_nbytes
from mlx_delta.measure.sparsity import Sparsity, measure_density, measure_sparsity

from .saved import Fed


class Watched:
    """Follows a second generation, token by token, to where it first differs from the first.

    Args:
        tokens: The first one's.
        tokenizer: To write the two tokens.

    Attributes:
        odds: What the second one gave its own token there and the first one's; ``None``: they do
            not differ, or one only ends sooner.
        said: The same in words.
    """

    def __init__(self, tokens: list[int], tokenizer: TokenizerWrapper):
        self.odds: tuple[float, float] | None = None
        self.said = ""
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._count = 0

    def __call__(self, response: GenerationResponse) -> None:
        """Look at the next token."""
        index, self._count = self._count, self._count + 1
        if self.said or index >= len(self._tokens) or response.token == self._tokens[index]:
            return
        pair = response.token, self._tokens[index]
        own, other = (float(mx.exp(response.logprobs[t].astype(mx.float32))) for t in pair)
        texts = [self._tokenizer.decode([token]) for token in pair]
        self.odds = own, other
        self.said = (
            f"there dense attention gives {own:.3f} to {texts[0]!r} and {other:.3f} to {texts[1]!r}"
        )


@dataclass(frozen=True)
class Report:
    """A generated text with its counts, speeds (tokens per second), sparsity and cache bytes."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None
    peak_memory_gb: float
    seconds: float
    sparsity: Sparsity
    cache_bytes: int
    dense_cache_bytes: int
    draft_cache_bytes: int | None = None
    seed: int | None = None
    tile_density: float | None = None  # of a prefill by tiles
    share_bytes: list[int] = field(default_factory=list)  # of each process's cache
    coded: bool = False  # keys are codes and nothing is held, so that there is no sparsity to tell
    scratch_bytes: int = 0  # of what caches keep written out besides, where no kernel reads them

    @classmethod
    def of(
        cls,
        text: str,
        tokens: list[int],
        response: GenerationResponse,
        caches: list[Any],
        cached_tokens: int,
        seconds: float,
        fed: Fed,
        draft_caches: list[Any],
    ) -> Report:
        """Take stock after the last response.

        Args:
            text: The answer.
            tokens: The answer's.
            response: mlx-lm's last one.
            caches: The model's.
            cached_tokens: How many came from a prompt cache.
            seconds: The whole time.
            fed: Tokens of the prompt that mlx-lm's response does not count.
            draft_caches: A draft model's, if there is one.
        """
        prompt_tokens = fed.tokens + response.prompt_tokens
        held = [c for c in leaves(caches) if isinstance(c, HeldKeys)]
        prompt_seconds = fed.seconds + response.prompt_tokens / response.prompt_tps
        return cls(
            text=text,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / prompt_seconds,
            generation_tokens=response.generation_tokens,
            generation_tps=response.generation_tps,
            finish_reason=response.finish_reason,
            peak_memory_gb=response.peak_memory,
            seconds=seconds,
            sparsity=measure_sparsity(caches, cached_tokens + prompt_tokens),
            cache_bytes=sum(c.nbytes for c in caches),
            coded=bool(held) and all(c.config.key_format == "codes" for c in held),
            scratch_bytes=scratch_nbytes(caches),
            dense_cache_bytes=sum(
                c.dense_nbytes if isinstance(c, HeldKeys) else c.nbytes for c in leaves(caches)
            ),
            draft_cache_bytes=sum(c.nbytes for c in draft_caches) if draft_caches else None,
            tile_density=measure_density(caches),
        )

    def lines(self, dense: Report | None = None, odds: str = "") -> list[str]:
        """mlx-lm's three lines, one for sparsity, one for the cache, and the comparison's.

        Args:
            dense: What was generated without the delta.
            odds: What it thought of the two tokens where it first differs, in words.
        """
        s, megabyte = self.sparsity, 1e6
        sparsity = (
            f"Sparsity: {s.prefill:.3f} prefill, {s.decode:.3f} decode, {s.overall:.3f} overall "
            f"(paper's formula: {s.paper:.3f})"
        )
        lines = [
            f"Prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.3f} tokens-per-sec",
            f"Generation: {self.generation_tokens} tokens, "
            f"{self.generation_tps:.3f} tokens-per-sec",
            f"Peak memory: {self.peak_memory_gb:.3f} GB",
            *([] if self.coded else [sparsity]),
            *([] if self.tile_density is None else [f"Tiles: {self.tile_density:.3f} computed"]),
            cache_line(self.cache_bytes, self.dense_cache_bytes, self.scratch_bytes),
        ]
        if len(self.share_bytes) > 1:
            shares = ", ".join(f"{size / megabyte:.2f}" for size in self.share_bytes)
            lines.append(f"Processes: {len(self.share_bytes)}, with caches of {shares} MB")
        if self.draft_cache_bytes is not None:
            lines.append(f"Draft model's cache: {self.draft_cache_bytes / megabyte:.2f} MB")
        if self.seed is not None:
            lines.append(f"Seed: {self.seed} (--seed {self.seed} repeats this text)")
        if dense is not None:
            lines.append(self._comparison(dense, odds))
        return lines

    def first_difference(self, dense: Report) -> int | None:
        """Index of the first token that differs; ``None`` if none does."""
        shorter = min(len(self.tokens), len(dense.tokens))
        for i in range(shorter):
            if self.tokens[i] != dense.tokens[i]:
                return i
        return None if len(self.tokens) == len(dense.tokens) else shorter

    def _comparison(self, dense: Report, odds: str) -> str:
        index = self.first_difference(dense)
        if index is None:
            return f"Compare: the same {len(self.tokens)} tokens without the delta"
        return (
            f"Compare: differs from token {index + 1} of {len(self.tokens)} on"
            f"{': ' if odds else ''}{odds}; without the delta:\n{dense.text}"
        )

    def to_dict(
        self,
        model: str,
        delta: DeltaConfig | None,
        dense: Report | None = None,
        odds: tuple[float, float] | None = None,
    ) -> dict[str, Any]:
        """The same as plain JSON values; ``delta`` is the setting that the caches ran with."""
        values: dict[str, Any] = {
            "model": model,
            "delta": _setting(delta),
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "prompt_tps": self.prompt_tps,
            "generation_tps": self.generation_tps,
            "prefill_sparsity": self.sparsity.prefill,
            "decode_sparsity": self.sparsity.decode,
            "overall_sparsity": self.sparsity.overall,
            "paper_sparsity": self.sparsity.paper,
            "tile_density": self.tile_density,
            "cache_bytes": self.cache_bytes,
            "dense_cache_bytes": self.dense_cache_bytes,
            "scratch_bytes": self.scratch_bytes,
            "peak_memory_gb": self.peak_memory_gb,
            "finish_reason": self.finish_reason,
            "seconds": self.seconds,
            "seed": self.seed,
        }
        if len(self.share_bytes) > 1:
            values["share_bytes"] = self.share_bytes
        if self.draft_cache_bytes is not None:
            values["draft_cache_bytes"] = self.draft_cache_bytes
        if dense is not None:
            values["dense_text"] = dense.text
            values["first_difference"] = self.first_difference(dense)
            values["odds_there"] = odds
        return values


def said_of_reading(
    args: argparse.Namespace, whole: list[int], fed: Fed, cached: int, caches: list[Any]
) -> str:
    """What is printed of a prompt that was read and kept."""
    places = [place for place in (args.save_prompt_cache, args.cache_dir) if place is not None]
    known = f", {cached} of them known already" if cached else ""
    speed = f", {fed.tokens / fed.seconds:.3f} tokens-per-sec" if fed.tokens else ""
    return (
        f"Prompt: {len(whole)} tokens{known}{speed}\n"
        f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB\n"
        f"Cache: {sum(c.nbytes for c in caches) / 1e6:.2f} MB, in {' and '.join(places)}"
    )


def cache_line(size: int, dense: int, scratch: int) -> str:
    """What caches take, of what dense ones would; and what is in memory besides."""
    line = f"Cache: {size / 1e6:.2f} MB (dense: {dense / 1e6:.2f} MB)"
    if scratch:
        line += (
            f", and {scratch / 1e6:.2f} MB written out while decoding, as there is no GPU to read "
            "stored ones"
        )
    return line


def _setting(delta: DeltaConfig | None) -> dict[str, Any] | None:
    """The setting as JSON values, its sensitivities by name: there are thousands of numbers."""
    if delta is None:
        return None
    values = delta.to_dict()
    if isinstance(values.get("sensitivities"), dict):
        values["sensitivities"] = repr(delta.sensitivities)
    return values
