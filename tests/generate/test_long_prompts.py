"""A prompt of any length in the same memory; examples/peak_memory.py has 100,000 tokens."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.generate import generate_step

from mlx_delta import DeltaConfig
from mlx_delta.generate import make_caches
from tests.tiny import llama_model, tokens


def peak(model, length: int) -> tuple[int, int]:
    """Bytes at most while a prompt is read, and of the caches after it."""
    caches = make_caches(model, length, 512)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prompt = tokens(length)[0]
    for _ in generate_step(prompt, model, max_tokens=1, prompt_cache=caches, prefill_step_size=512):
        pass
    mx.eval([cache.state for cache in caches])
    assert caches[0].offset == length + 1
    return mx.get_peak_memory() - before, sum(cache.nbytes for cache in caches)


def test_a_prompt_of_eight_times_the_length_takes_the_same_memory():
    config = DeltaConfig(key_format="codes", key_bits=4, value_bits=16)
    model = llama_model(config, num_hidden_layers=2)
    (most, kept), (more, later) = peak(model, 2000), peak(model, 16000)
    # The peak varies with how many steps are in flight; keys and values alone would double it.
    assert more < 1.5 * most and later < 1.1 * kept
