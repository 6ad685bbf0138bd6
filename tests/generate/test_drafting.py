"""Speculative decoding: with the delta on both models the tokens are those of plain decoding."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step

from mlx_delta.cache import length_of
from mlx_delta.cache.window_only import WindowOnlyCache
from tests.tiny import SMALL, llama_model

SHAPE = {"hidden_size": 64, "head_dim": 32}
SETTINGS = {
    "full": SMALL,
    "deltas": SMALL.changed(level=0.03, key_bits=4, value_bits=4),
    "window only": SMALL,
}
PROMPT = [(i * i * 7 + 3) % 4000 for i in range(70)]
TOKENS = 40  # five blocks


def caches_of(name: str, model) -> list:
    caches = model.make_cache()
    if name != "window only":
        return caches
    return [WindowOnlyCache(cache.config) for cache in caches]


@pytest.fixture(scope="module", params=SETTINGS)
def plain(request):
    """A setting's name, its model, and the tokens of plain decoding."""
    model = llama_model(SETTINGS[request.param], **SHAPE)
    caches = caches_of(request.param, model)
    steps = generate_step(mx.array(PROMPT), model, prompt_cache=caches, max_tokens=TOKENS)
    return request.param, model, [int(token) for token, _ in steps]


@pytest.mark.parametrize(
    ("draft", "n_drafts"),
    [("itself", 8), ("half right", 3), ("another", 1), ("of another setting", 4)],
)
def test_drafted_tokens_are_those_of_plain_decoding(plain, draft, n_drafts):
    name, model, wanted = plain
    drafters = {
        "itself": lambda: model,
        "half right": lambda: almost(model),
        "another": lambda: llama_model(SMALL, seed=5, num_hidden_layers=2),
        "of another setting": lambda: llama_model(SETTINGS["deltas"], **SHAPE),
    }
    drafter = drafters[draft]()
    own, drafted = caches_of(name, model), drafter.make_cache()
    steps = speculative_generate_step(
        mx.array(PROMPT),
        model,
        drafter,
        num_draft_tokens=n_drafts,
        prompt_cache=[*own, *drafted],
        max_tokens=TOKENS,
    )
    found = [(int(token), from_draft) for token, _, from_draft in steps]
    assert [token for token, _ in found] == wanted
    accepted = sum(from_draft for _, from_draft in found)
    if draft == "itself" and name != "window only":  # whose draft sees the far keys
        assert accepted >= TOKENS * n_drafts // (n_drafts + 1) - n_drafts
    if draft == "half right":
        assert 0 < accepted < TOKENS  # both ways are gone
    # What is left can go on: the text, at most without its last token.
    assert length_of(own) in (len(PROMPT) + TOKENS - 1, len(PROMPT) + TOKENS)


def almost(model):
    """The same model with a little noise in its last layer."""
    other = llama_model(model.args.delta, **SHAPE)
    layer = other.layers[-1].mlp.down_proj
    mx.random.seed(2)
    layer.weight = layer.weight + 0.05 * mx.random.normal(layer.weight.shape)
    return other
