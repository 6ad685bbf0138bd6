"""Perplexity and divergence of windows, against NumPy on logits and bytes counted apart."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_delta import DeltaConfig
from mlx_delta.evaluate import (
    BUNDLED_TEXT,
    LanguageOptions,
    make_windows,
    measure_window,
    read_text,
    summarize_kld,
    summarize_perplexity,
)
from mlx_delta.measure.settings import parse_setting, parse_settings
from tests.tiny import SMALL, llama_model

from . import tokenizers

TEXT = read_text(BUNDLED_TEXT)
NAMES = ["dense", "delta", "kv8", "rotating:40", "window-only", "delta:kv=small"]


@pytest.fixture(scope="module")
def model():
    return llama_model(SMALL, head_dim=64)  # what an 8-bit cache takes


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.demo()


def windows_of(tokenizer, length: int, windows: int = 2) -> list[list[int]]:
    return make_windows(tokenizer, TEXT, LanguageOptions(windows, length))


def log_softmax(logits) -> np.ndarray:
    """In float64."""
    logits = np.array(logits.astype(mx.float32)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def teacher_forced(model, setting, window: list[int]) -> np.ndarray:
    """Log-probabilities of the second half, fed token by token."""
    half = (len(window) - 1) // 2
    caches = setting.make_caches(model, half)
    setting.prefill(model, window[:half], caches)
    rows = [setting.forward(model, [token], caches) for token in window[half:-1]]
    return log_softmax(mx.concatenate(rows))


# 40 and 41 scored tokens: a whole chunk and a part of one.
@pytest.mark.parametrize("length", [80, 81])
def test_every_setting_agrees_with_numpy_token_by_token(model, tokenizer, length):
    window = windows_of(tokenizer, length)[0]
    settings = parse_settings(NAMES, SMALL)
    records = measure_window(model, tokenizer, window, settings)
    half = length // 2
    targets = np.array(window[half + 1 :])
    dense = teacher_forced(model, settings[0], window)
    whole = log_softmax(model(mx.array(window[:-1])[None], cache=[KVCache() for _ in range(3)])[0])
    np.testing.assert_allclose(dense, whole[half:], atol=1e-4)
    for setting, record in zip(settings, records, strict=True):
        logs = teacher_forced(model, setting, window)
        nats = -logs[np.arange(len(targets)), targets].sum()
        kld = (np.exp(dense) * (dense - logs)).sum(axis=-1).mean()
        assert record["tokens"] == len(targets) == length - half
        assert record["nats"] == pytest.approx(nats, rel=1e-4)
        assert record["kld"] == pytest.approx(kld, rel=2e-3, abs=1e-6)
        assert record["top1"] == pytest.approx(np.mean(dense.argmax(-1) == logs.argmax(-1)))


def test_dense_diverges_not_at_all_and_dropping_keys_most(model, tokenizer):
    window = windows_of(tokenizer, 160)[1]
    records = measure_window(model, tokenizer, window, parse_settings(NAMES, SMALL))
    by_name = dict(zip(NAMES, records, strict=True))
    assert by_name["dense"]["kld"] == 0 and by_name["dense"]["top1"] == 1
    assert 0 < by_name["kv8"]["kld"] < by_name["delta"]["kld"] < by_name["window-only"]["kld"]


def test_dense_need_not_be_among_the_settings(model, tokenizer):
    window = windows_of(tokenizer, 100)[0]
    both = measure_window(model, tokenizer, window, parse_settings(["delta", "dense"], SMALL))
    alone = measure_window(model, tokenizer, window, [parse_setting("delta", SMALL)])
    assert alone == both[:1]
    plain = measure_window(model, tokenizer, window, [parse_setting("delta", SMALL)], kld=False)
    assert plain == [{k: v for k, v in alone[0].items() if not k.startswith(("kld", "top1"))}]


def test_records_hold_the_caches_figures(model, tokenizer):
    window = windows_of(tokenizer, 200)[0]
    dense, delta = measure_window(model, tokenizer, window, parse_settings(NAMES[:2], SMALL))
    # 3 layers of 2 heads of 64, keys and values, 16 bits, room for 256 tokens.
    assert dense["cache_bytes"] == 3 * 2 * 64 * 2 * 2 * 256
    assert dense["overall_sparsity"] == 0
    heads = np.array(delta["prefill_heads"])
    assert heads.shape == (3, 2)
    assert heads.mean() == pytest.approx(delta["prefill_sparsity"], abs=1e-4)
    assert 0 < delta["prefill_sparsity"] < delta["overall_sparsity"] < delta["decode_sparsity"] < 1


def test_window_only_counts_every_key_that_is_never_seen(model):
    from mlx_delta import measure_sparsity

    config = DeltaConfig(block_size=8, window=16, sinks=11)  # sinks reach into a second block
    setting = parse_setting("window-only", config)
    caches = setting.make_caches(model)
    mask = np.array(caches[0].make_mask(100, return_array=True)).squeeze()
    setting.prefill(model, list(range(100)), caches)
    sparsity = measure_sparsity(caches, 60)
    causal = np.tril(np.ones((100, 100), bool))
    for value, rows in ((sparsity.prefill, slice(60)), (sparsity.decode, slice(60, 100))):
        assert value == pytest.approx(1 - mask[rows].sum() / causal[rows].sum())


@pytest.mark.parametrize("make", [tokenizers.demo, tokenizers.byte_pairs])
def test_bytes_are_those_of_the_scored_tokens(model, make):
    tokenizer = make()
    text = "The café’s naïve owner – “Ærø”, said 漢字 – was  twenty.\n\nShe left… " * 30
    tokens = tokenizer.encode(text, add_special_tokens=False)
    seen = set()
    for length in (61, 90):
        for window in make_windows(tokenizer, text, LanguageOptions(50, length)):
            (record,) = measure_window(
                model, tokenizer, window, [parse_setting("dense")], kld=False
            )
            scored = window[length // 2 + 1 :]
            # A byte-level token is written with one character per byte.
            size = sum(len(token) for token in tokenizer.convert_ids_to_tokens(scored))
            # A character cut by an edge counts where it ends.
            assert abs(record["bytes"] - size) <= 2
            seen.add(record["bytes"] - size)
    assert 0 in seen and len(tokens) > 500


def test_bytes_of_plain_text_are_exact(model):
    tokenizer = tokenizers.metaspace()
    window = windows_of(tokenizer, 120)[1]
    (record,) = measure_window(model, tokenizer, window, [parse_setting("dense")], kld=False)
    pieces = tokenizer.convert_ids_to_tokens(window[61:])
    assert record["bytes"] == sum(len(piece) for piece in pieces)  # "▁" stands for one space


@pytest.mark.parametrize("make", [tokenizers.demo, tokenizers.byte_pairs])
def test_windows_share_no_tokens_and_are_spread(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    bos = [tokenizer.bos_token_id] if tokenizer.encode("a")[0] == tokenizer.bos_token_id else []
    windows = make_windows(tokenizer, TEXT, LanguageOptions(3, 1000))
    assert [len(window) for window in windows] == [1001] * 3
    fresh = 1001 - len(bos)
    positions = []
    for window in windows:
        assert window[: len(bos)] == bos
        part = window[len(bos) :]
        positions.append(next(i for i in range(len(ids)) if ids[i : i + fresh] == part))
    available = len(ids) // fresh
    assert positions == [0, available // 3 * fresh, 2 * available // 3 * fresh]
    every = make_windows(tokenizer, TEXT, LanguageOptions(1000, 1000))
    assert len(every) == available


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LanguageOptions(0), r"windows must be >= 1 but got 0"),
        (LanguageOptions(1, 3), r"length must be >= 4 but got 3"),
        (LanguageOptions(1, 4096), r"4096 tokens is longer than the model's context of 2048"),
        (LanguageOptions(), r"the text has \d+ tokens but a window takes 2049; give a longer"),
    ],
)
def test_misuse_is_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make_windows(tokenizer, TEXT[:500], options, 2048)


def test_broken_logits_are_an_error(tokenizer):
    model = llama_model(SMALL)
    model.model.norm.weight = model.model.norm.weight * math.nan
    window = windows_of(tokenizer, 40)[0]
    with pytest.raises(ValueError, match=r"logits are not finite with 'delta'"):
        measure_window(model, tokenizer, window, [parse_setting("delta", SMALL)], kld=False)


def test_summaries_weigh_windows_by_their_bytes():
    figures = {
        "prefill_sparsity": 0.5,
        "decode_sparsity": 0.25,
        "overall_sparsity": 0.4,
        "prefill_heads": [],
        "cache_bytes": 100,
    }
    records = [
        {"nats": n, "tokens": 100, "bytes": b, "kld": k, "top1": t, **figures}
        for n, b, k, t in (
            (300.0, 400, 0.01, 0.9),
            (250.0, 350, 0.03, 0.8),
            (320.0, 390, 0.02, 1.0),
        )
    ]
    summary = summarize_perplexity(records)
    assert summary["score"] == pytest.approx(870 / math.log(2) / 1140)
    assert summary["metrics"]["perplexity"] == pytest.approx(math.exp(8.7 / 3))
    bits = np.array([300, 250, 320]) / math.log(2)
    sizes = np.array([400, 350, 390])
    error = np.sqrt(((bits - summary["score"] * sizes) ** 2).sum() / 6) / sizes.mean()
    assert summary["high"] - summary["score"] == pytest.approx(4.303 * error)
    divergence = summarize_kld(records)
    assert divergence["score"] == pytest.approx(0.02)
    assert divergence["high"] - 0.02 == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert divergence["metrics"]["top1"] == pytest.approx(0.9)
