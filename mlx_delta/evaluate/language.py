"""Perplexity and KL divergence of a text's windows, as they are when tokens are decoded.

The first half of a window is prefilled and not scored. The second half is teacher-forced, so every
scored token is predicted from what the cache has kept, as in generation: a prompt's own queries
see a quantized cache before it is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta.measure.settings import Setting
from mlx_delta.measure.stats import mean, ratio
from mlx_delta.measure.text import encode_text, first_tokens

from .figures import cache_figures, mean_figures

LENGTH = 2048
# Of the task "fidelity": chunks as llama.cpp's --kl-divergence and the tools after it take them.
FIDELITY_LENGTH = 512
CHUNK = 128  # tokens at a time: logits of a whole window are too many to keep


@dataclass(frozen=True)
class LanguageOptions:
    """Which windows.

    Attributes:
        windows: At most so many, spread evenly over the text.
        length: Tokens of a window; ``None``: 2,048, or the model's context if that is less.
    """

    windows: int = 8
    length: int | None = None


def make_windows(
    tokenizer: Any, text: str, options: LanguageOptions, context: int | None = None
) -> list[list[int]]:
    """Windows of a text that share no tokens.

    Each holds one token more than ``length``: the last one is only predicted. BOS takes the place
    of its first token where the tokenizer puts one before every text.

    Raises:
        ValueError: An option is out of range, or the text is shorter than a window.
    """
    length = options.length or min(LENGTH, context or LENGTH)
    for name, value, least in (("windows", options.windows, 1), ("length", length, 4)):
        if value < least:
            raise ValueError(f"[perplexity] {name} must be >= {least} but got {value}.")
    if context is not None and length > context:
        raise ValueError(
            f"[perplexity] a window of {length} tokens is longer than the model's context of "
            f"{context}; give a smaller --length."
        )
    ids = encode_text(tokenizer, text)
    first = first_tokens(tokenizer)
    fresh = length + 1 - len(first)
    available = len(ids) // fresh
    if not available:
        raise ValueError(
            f"[perplexity] the text has {len(ids)} tokens but a window takes {fresh}; give a "
            "longer --text or a smaller --length."
        )
    count = min(options.windows, available)
    starts = [i * available // count * fresh for i in range(count)]
    return [first + ids[start : start + fresh] for start in starts]


def measure_window(
    model: nn.Module,
    tokenizer: Any,
    window: Sequence[int],
    settings: Sequence[Setting],
    kld: bool = True,
) -> list[dict[str, Any]]:
    """Measure one window with settings in lockstep, so that one dense pass serves them all.

    Args:
        model: From :func:`mlx_delta.load`.
        tokenizer: Its tokenizer, to count bytes.
        window: Token ids, from :func:`make_windows`.
        settings: Ways to keep keys and values.
        kld: Whether to compare with a dense cache.

    Returns:
        For each setting ``nats``, ``tokens`` and ``bytes`` of what was scored, and its caches'
        figures; with ``kld`` also the mean over tokens of KL(p_dense || p_setting) in nats, the
        99th of a hundred and the largest, and ``top1``, the share of tokens where both rank the
        same token first.
    """
    half = (len(window) - 1) // 2
    running = list(settings)
    # A dense setting is its own reference: the same computation twice would say nothing.
    reference = next((i for i, s in enumerate(running) if s.kind == "dense"), len(running))
    if kld and reference == len(running):
        running.append(Setting("dense", "dense"))
    all_caches = [setting.make_caches(model, half) for setting in running]
    for setting, caches in zip(running, all_caches, strict=True):
        setting.prefill(model, window[:half], caches)
    nats, agreed = (np.zeros(len(running)) for _ in range(2))
    divergences: list[list[float]] = [[] for _ in running]
    for start in range(half, len(window) - 1, CHUNK):
        end = min(start + CHUNK, len(window) - 1)
        targets = mx.array(list(window[start + 1 : end + 1]))[:, None]
        dense = mx.zeros(0)
        # The reference first, whichever it is.
        for i in sorted(range(len(running)), key=lambda i: i != reference):
            logits = running[i].forward(model, window[start:end], all_caches[i])
            logs = _log_softmax(logits)
            nats[i] -= mx.take_along_axis(logs, targets, axis=-1).sum().item()
            dense = logs if i == reference else dense
            if kld:
                divergences[i] += np.array((mx.exp(dense) * (dense - logs)).sum(axis=-1)).tolist()
                agreed[i] += (mx.argmax(dense, axis=-1) == mx.argmax(logs, axis=-1)).sum().item()
    broken = np.flatnonzero(~np.isfinite(nats + [sum(values) for values in divergences]))
    if len(broken):
        raise ValueError(
            f"[perplexity] the model's logits are not finite with {running[broken[0]].name!r}."
        )
    scored = len(window) - 1 - half
    size = _text_bytes(tokenizer, window[1:]) - _text_bytes(tokenizer, window[1 : half + 1])
    records = []
    for i in range(len(settings)):
        record = {"tokens": scored, "bytes": size, "nats": float(nats[i])}
        if kld:
            values = np.array(divergences[i], np.float64)
            record |= {"kld": float(values.mean()), "top1": float(agreed[i] / scored)}
            record |= {"kld_p99": float(np.quantile(values, 0.99)), "kld_max": float(values.max())}
        records.append(record | cache_figures(all_caches[i], half))
    return records


def _log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities in float32, along the last axis."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _text_bytes(tokenizer: Any, ids: Sequence[int]) -> int:
    """Bytes of the text of some tokens; a character that they only begin is not counted."""
    return len(tokenizer.decode(list(ids)).rstrip("\ufffd").encode())


def summarize_perplexity(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bits per byte with its interval over windows, and perplexity per token."""
    bits = [record["nats"] / math.log(2) for record in records]
    score, low, high = ratio(bits, [record["bytes"] for record in records])
    nats = sum(record["nats"] for record in records) / sum(record["tokens"] for record in records)
    return {
        "metric": "bits_per_byte",
        "higher_is_better": False,
        "score": score,
        "low": low,
        "high": high,
        "samples": len(records),
        "metrics": {"perplexity": math.exp(nats)},
        **mean_figures(records),
    }


def summarize_kld(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """KL divergence with its interval over windows, and top-1 agreement."""
    score, low, high = mean([record["kld"] for record in records])
    top1, top1_low, top1_high = mean([record["top1"] for record in records])
    return {
        "metric": "kld",
        "higher_is_better": False,
        "score": score,
        "low": low,
        "high": high,
        "samples": len(records),
        "metrics": {
            "top1": top1,
            "low:top1": top1_low,
            "high:top1": top1_high,
            "kld_p99": sum(record.get("kld_p99", math.nan) for record in records) / len(records),
            "kld_max": max(record.get("kld_max", math.nan) for record in records),
        },
        **mean_figures(records),
    }
