"""The demo model, served: many at once, compressed, with a draft model, and for a long time."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_delta import load

from . import soak
from .running import Running, make_provider, running

WORDS = (
    "night road dark money horse river letter castle garden silver king winter old friend sword"
).split()
PROMPTS = [
    " ".join(WORDS[(7 * i + j * (i % 5 + 1)) % 15] for j in range(2 + 5 * i % 67)) + ". It was"
    for i in range(32)
]
# Blocks so small that these prompts reach far outside the window.
STORED = "key_format=codes,key_bits=4,value_bits=8,block_size=16,window=16"


@pytest.fixture(scope="module")
def stored_provider():
    return make_provider("--delta", STORED)


def clear_text(server: Running, prompt: str, tokens: int) -> tuple[str, bool]:
    """The answer up to where the two likeliest tokens are as good as equal; whether it is whole.

    A batch rounds otherwise than a single request; see ``soak.py``.
    """
    found = server.complete(prompt, max_tokens=tokens, logprobs=2).choices[0].logprobs
    clear = 0
    for top in found.top_logprobs:
        first, *others = sorted(top.values(), reverse=True)
        if not others or first - others[0] < 0.01:
            break
        clear += 1
    text = "".join(found.tokens[:clear])
    return text.lstrip(" "), clear == len(found.tokens)  # mlx-lm leaves a first space out


def test_32_streams_at_once_say_what_each_says_alone(stored_provider):
    def streamed(prompt: str) -> str:
        with server.client() as client:
            parts = client.completions.create(
                model="demo", prompt=prompt, max_tokens=6, temperature=0, stream=True
            )
            return "".join(part.choices[0].text for part in parts)

    with running(stored_provider) as server, ThreadPoolExecutor(32) as pool:
        together = list(pool.map(streamed, PROMPTS))
        assert server.engine.figures()["cached_bytes"] > 0
    with running(stored_provider) as server:
        alone = [clear_text(server, prompt, 6) for prompt in PROMPTS]
    for text, (clear, whole) in zip(together, alone, strict=True):
        assert text.lstrip(" ").startswith(clear)
        assert text.lstrip(" ") == clear or not whole
    assert sum(whole for _, whole in alone) >= 16
    assert len(set(together)) > 10


def test_a_fact_in_a_cached_begin_is_remembered(demo):
    story = (
        "Remember: the password of Anna is silver king. Remember: the password of Henry is "
        "winter garden. " + "The night was dark, and the road was long, and nobody came. " * 24
    )
    question = "The password of Anna is"
    first = demo.complete(story + question, max_tokens=4)
    assert first.choices[0].text.startswith("silver king")
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    again = demo.complete(story + question, max_tokens=4)
    assert again.usage.prompt_tokens_details.cached_tokens > 300
    assert again.choices[0].text == first.choices[0].text
    # Another question to the same story, which the first answer's cache can't be cut to.
    other = demo.complete(story + question + " silver king. The password of Henry is", max_tokens=4)
    assert other.choices[0].text.startswith("winter garden")


def test_a_draft_model_changes_nothing_in_the_answer(stored_provider):
    provider = copy.copy(stored_provider)
    provider.draft_model, _ = load("demo", {"block_size": 16, "window": 16, "level": 0.5})
    with running(stored_provider) as server:
        plain = [clear_text(server, prompt, 10) for prompt in PROMPTS[12:14]]
    with running(provider) as server:
        for _ in range(2):  # the second time from a cache
            for prompt, (text, _) in zip(PROMPTS[12:14], plain, strict=True):
                made = server.complete(prompt, max_tokens=10)  # few: it can be taken back
                assert text and made.choices[0].text.lstrip(" ").startswith(text)
        assert made.usage.prompt_tokens_details.cached_tokens > 20
        assert server.engine.rows == 1


def test_a_chat_without_a_template_goes_on(demo):
    messages = [{"role": "user", "content": "Where is the garden of the old king?"}]
    with demo.client() as client:
        for _ in range(2):
            made = client.chat.completions.create(model="demo", messages=messages, max_tokens=6)
            text = made.choices[0].message.content
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go."}]
    assert made.usage.prompt_tokens_details.cached_tokens > 10


def test_a_short_soak(demo_provider):
    """The long one is a command: ``python -m tests.server.soak 2000``."""
    prompts = soak.make_prompts("demo", 10, 120, seed=1)
    flags = demo_provider.cli_args

    def opened() -> soak.Server:
        context = running(demo_provider)
        server = context.__enter__()
        return soak.Server(server.root, lambda _: context.__exit__(None, None, None))

    flags.prompt_cache_size = 0
    quiet = opened()
    samples = soak.ask_quietly(quiet, prompts)
    quiet.end(True)
    flags.prompt_cache_size = 10
    storm = soak.soak(opened, samples, 48, 24, 6, 16_384, 60.0, say=lambda _: None)
    assert storm.faults == []
    assert sum(storm.counts.values()) == 48 and len(storm.counts) >= 5 and storm.cached > 0
