"""Going back to a mark: the text goes on as if what came after had never been there."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.cache import length_of
from mlx_delta.cache.marks import go_to, mark
from mlx_delta.config import DeltaConfig
from tests.tiny import SMALL, llama_model

SHAPE = {"hidden_size": 64, "head_dim": 32}
SETTINGS = {
    "full": SMALL,
    "one chain": dataclasses.replace(SMALL, keyframes=False, run_value="first"),
    "deltas": SMALL.changed(level=0.03, key_bits=4, value_bits=4),
    "codes": dataclasses.replace(SMALL, key_format="codes", key_bits=3.5, value_bits=3),
    "no window": dataclasses.replace(SMALL, window=0),
    "dense": None,
}
RNG = np.random.default_rng(1)
TEXT, AFTER, OTHER = (RNG.integers(0, 4096, n).tolist() for n in (90, 70, 60))


@pytest.fixture(scope="module", params=SETTINGS)
def model(request):
    return llama_model(SETTINGS[request.param], **SHAPE)


def feed(model, caches, tokens) -> np.ndarray:
    """Logits of a part fed at once and of three tokens one by one."""
    parts = [tokens[:-3], *([token] for token in tokens[-3:])]
    logits = [model(mx.array([part]), cache=caches)[0] for part in parts if part]
    mx.eval([cache.state for cache in caches])
    return np.array(mx.concatenate(logits))


def new_caches(model) -> list:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


@pytest.mark.parametrize("length", [7, 24, 90])
def test_the_text_goes_on_as_if_nothing_had_come_after(model, length):
    caches, undisturbed = new_caches(model), new_caches(model)
    for own in (caches, undisturbed):
        feed(model, own, TEXT[:length])
    place = mark(caches)
    for after in (AFTER, AFTER):  # twice beyond what can be rewound
        feed(model, caches, after)
        assert go_to(caches, place) and length_of(caches) == length
    wanted = feed(model, undisturbed, OTHER)
    assert np.array_equal(feed(model, caches, OTHER), wanted)


def test_a_mark_before_a_mark(model):
    caches, undisturbed = new_caches(model), new_caches(model)
    feed(model, caches, TEXT[:30])
    feed(model, undisturbed, TEXT[:30])
    first = mark(caches)
    feed(model, caches, TEXT[30:])
    second = mark(caches)
    feed(model, caches, AFTER)
    assert go_to(caches, second) and go_to(caches, first)
    assert np.array_equal(feed(model, caches, OTHER), feed(model, undisturbed, OTHER))


def test_a_mark_is_as_small_as_the_window(model):
    caches = new_caches(model)
    feed(model, caches, TEXT)
    place = mark(caches)
    kept = [x.shape[2] for arrays in place.near for x in arrays or ()]
    assert all(n <= 16 + 8 for n in kept)
    assert place.nbytes == sum(x.nbytes for arrays in place.near for x in arrays or ())


def test_what_cannot_be_marked():
    model = llama_model(DeltaConfig.paper(), **SHAPE)
    caches = new_caches(model)
    feed(model, caches, TEXT)
    assert mark(caches) is None or caches[0].config.block_fraction is None
    model = llama_model(SMALL, **SHAPE)
    caches = model.make_cache()
    model(mx.array([TEXT, TEXT]), cache=caches)
    assert mark(caches) is None  # two texts
    layers = ["full_attention", "sliding_attention", "full_attention"]
    model = llama_model(SMALL, **SHAPE, layer_types=layers, sliding_window=32)
    caches = new_caches(model)
    feed(model, caches, TEXT[:20])
    place = mark(caches)
    feed(model, caches, TEXT)
    assert mark(caches) is None and not go_to(caches, place)
    assert length_of(caches) == 20 + len(TEXT)
