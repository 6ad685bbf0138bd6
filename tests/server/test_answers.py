"""What clients get, by OpenAI's own client: texts, streams, tools, probabilities, prefixes."""

from __future__ import annotations

import json

import pytest

from .parrot import CONTEXT, SAYINGS, ParrotProvider, words
from .running import running

COUNT = "".join(SAYINGS["count"])


def chat(server, word: str, stream: bool = False, **options):
    """An answer to a chat whose last word is this."""
    messages = [{"role": "user", "content": word}]
    with server.client() as client:
        made = client.chat.completions.create(
            model="parrot", messages=messages, stream=stream, **options
        )
        return list(made) if stream else made


def test_a_completion_ends_by_itself(parrot):
    made = parrot.complete("w1 greet", max_tokens=50)
    assert made.choices[0].text == "Hello, world."
    assert made.choices[0].finish_reason == "stop"
    assert (made.object, made.usage.prompt_tokens, made.usage.completion_tokens) == (
        *("text_completion", 2),
        4,  # the end is a token too
    )


def test_a_completion_ends_at_max_tokens(parrot):
    made = parrot.complete("count", max_tokens=3)
    assert made.choices[0].text.strip() == "0, 1, 2,"
    assert made.choices[0].finish_reason == "length" and made.usage.completion_tokens == 3


def test_an_answer_is_cut_to_what_the_context_holds(parrot):
    made = parrot.complete(words(CONTEXT - 4), max_tokens=100)
    assert made.usage.completion_tokens == 4 and made.choices[0].finish_reason == "length"


def test_a_stream_is_the_answer_in_pieces(parrot):
    with parrot.client() as client:
        pieces = list(
            client.completions.create(
                model="parrot",
                prompt="count",
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    *parts, last = pieces
    assert "".join(part.choices[0].text for part in parts) == parrot.text("count", max_tokens=5)
    assert [part.choices[0].finish_reason for part in parts][-2:] == [None, "length"]
    assert last.choices == [] and last.usage.completion_tokens == 5


def test_a_chat_goes_through_the_template(parrot):
    made = chat(parrot, "greet")
    assert made.choices[0].message.content == "Hello, world."
    assert made.choices[0].message.role == "assistant" and made.object == "chat.completion"
    text = "".join(part.choices[0].delta.content or "" for part in chat(parrot, "greet", True))
    assert text == "Hello, world."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("beta", "alpha "),  # over two tokens
        (["gamma", "delta"], "alpha beta "),
        (["ta gam", "bet"], "alpha "),  # the first that comes
        (["none", "mad"], "alpha betagamma delta".replace("tag", "ta g")),
    ],
    ids=["one", "two", "earliest", "none"],
)
def test_stop_words_are_found_in_the_text(parrot, stop, text, stream):
    with parrot.client() as client:
        made = client.completions.create(
            model="parrot", prompt="sort", max_tokens=20, stop=stop, stream=stream
        )
        parts = list(made) if stream else [made]
    assert "".join(part.choices[0].text for part in parts) == text
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_stop_word_ends_the_work_too(parrot, parrot_provider):
    calls = parrot_provider.model.hold.calls
    assert parrot.text("count", max_tokens=300, stop="3, 4").strip() == "0, 1, 2,"
    assert parrot_provider.model.hold.calls - calls < 12


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_begin_of_a_mark_is_shown_when_nothing_follows(parrot, stream):
    made = chat(parrot, "less", stream)
    parts = [p.choices[0].delta.content or "" for p in made] if stream else None
    assert ("".join(parts) if stream else made.choices[0].message.content) == "a <"


def test_thoughts_stand_beside_the_answer(parrot):
    message = chat(parrot, "think").choices[0].message
    assert message.content == "Yes." and message.reasoning == "Hm."


def test_a_call_of_a_tool_is_read(parrot):
    made = chat(parrot, "add").choices[0]
    (call,) = made.message.tool_calls
    assert (call.type, call.function.name) == ("function", "add")
    assert json.loads(call.function.arguments) == {"a": 1}
    assert made.finish_reason == "tool_calls" and made.message.content.strip() == "Wait."


def test_a_call_of_a_tool_comes_in_a_stream(parrot):
    parts = chat(parrot, "add", True)
    calls = [call for part in parts for call in part.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert parts[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("stumble", "<tool_call>{oops</tool_call>"),
        ("shout", '<tool_call>{"name": 3, "arguments": 4}</tool_call>'),
    ],
)
def test_a_call_that_can_not_be_read_is_shown(parrot, word, text, stream):
    made = chat(parrot, word, stream)
    if stream:
        shown = "".join(part.choices[0].delta.content or "" for part in made)
        reason = made[-1].choices[0].finish_reason
    else:
        shown, reason = made.choices[0].message.content, made.choices[0].finish_reason
    assert (shown, reason) == (text, "stop")


def test_tools_and_their_results_go_into_the_template(parrot):
    messages = [
        {"role": "user", "content": "w1"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "greet"}]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with parrot.client() as client:
        made = client.chat.completions.create(model="parrot", messages=messages, tools=tools)
    assert made.choices[0].message.content == "Hello, world."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_log_probabilities_of_a_chat(parrot, stream):
    made = chat(parrot, "greet", stream, logprobs=True, top_logprobs=2)
    parts = made if stream else [made]
    content = [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    assert [token.token for token in content] == [*SAYINGS["greet"], "<end>"]
    assert content[0].bytes == list(b"Hello") and -0.1 < content[0].logprob < 0
    for token in content:
        assert [t.token for t in token.top_logprobs][0] == token.token
        assert len(token.top_logprobs) == 2 and token.top_logprobs[1].logprob < -5


def test_log_probabilities_of_a_sampled_token_are_its_own(parrot):
    # Another token than the likeliest is made to win.
    made = chat(parrot, "greet", logit_bias={"5": 100}, max_tokens=1, logprobs=True, top_logprobs=1)
    (token,) = made.choices[0].logprobs.content
    assert token.id == 5 == token.top_logprobs[0].id and token.logprob > -0.01


def test_log_probabilities_of_a_completion(parrot):
    found = parrot.complete("greet", logprobs=2).choices[0].logprobs
    assert found.tokens == [*SAYINGS["greet"], "<end>"]
    assert found.text_offset == [0, 5, 10, 13]
    assert all(value < 0 for value in found.token_logprobs)
    assert [list(top)[0] for top in found.top_logprobs] == found.tokens


def test_a_prompt_may_be_tokens(parrot, parrot_provider):
    tokens = parrot_provider.tokenizer.encode("w1 greet")
    for prompt in (tokens, [tokens], ["w1 greet"]):
        assert parrot.text(prompt) == "Hello, world."


def test_what_a_prompt_begins_with_is_read_once(parrot):
    def cached(prompt: str) -> int:
        made = parrot.complete(prompt, max_tokens=2)
        assert made.choices[0].text.strip() == "0, 1,"
        return made.usage.prompt_tokens_details.cached_tokens

    assert cached(words(100, first=50)) == 0
    assert cached(words(100, first=50)) == 99
    assert cached(words(100, first=50) + " count") >= 96
    assert cached(words(100, first=51)) == 0


def test_caches_last_from_one_start_to_the_next(tmp_path):
    folder = tmp_path / "prompts"

    def cached() -> int:
        provider = ParrotProvider(tmp_path, "--cache-dir", str(folder))
        with running(provider) as server:
            made = server.complete(words(100), max_tokens=3)
        assert made.choices[0].text.strip() == "0, 1, 2,"
        return made.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    assert cached() == 99
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    assert cached() == 0  # what was spoilt is read anew


def test_a_prompt_that_is_cached_to_its_end_is_answered(parrot, parrot_provider):
    """mlx-lm's server ends there: nothing would be left to feed."""
    answer = parrot_provider.tokenizer.encode("count")
    for i in range(4):
        made = parrot.complete(answer, max_tokens=1)
        assert made.choices[0].text.strip() == f"{i},"
        answer = [*answer, parrot_provider.tokenizer.convert_tokens_to_ids(f"{i}, ")]


def test_a_penalty_sees_the_cached_part_of_a_prompt(parrot):
    """The token that follows stands in the prompt, which the second time comes from a cache."""
    prompt = parrot.engine.model_provider.tokenizer
    tokens = [prompt.convert_tokens_to_ids("Hello"), *prompt.encode("w1 w2 w3 greet")]
    texts = {parrot.text(tokens, max_tokens=1, presence_penalty=20) for _ in range(3)}
    assert len(texts) == 1 and texts != {"Hello"}
