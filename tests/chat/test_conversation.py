"""A conversation answers as if all of it were read anew, whatever its caches have been through."""

from __future__ import annotations

import pytest

import mlx_delta
from mlx_delta.cache import length_of
from mlx_delta.chat import ContextFullError, Conversation
from mlx_delta.prefixes.chain import in_common
from tests.chat.conftest import set_template
from tests.tiny import SMALL, llama_model, write_llama

LONG = "It was a dark night, and the wind was in the trees. " * 3


def said(answer) -> str:
    return "".join(answer)


def check(conversation: Conversation) -> None:
    """The last answer is that of a model which reads the same tokens for the first time."""
    n = conversation.last.generated
    tokens = conversation._kept.known
    prompt, ids = tokens[:-n], tokens[-n:]
    model, tokenizer = conversation.model, conversation.tokenizer
    size = conversation._kept.max_kv_size
    steps = mlx_delta.stream_generate(model, tokenizer, prompt, max_tokens=n, max_kv_size=size)
    assert [step.token for step in steps] == ids
    # And these are the tokens of the conversation.
    assert conversation._prompt(conversation.messages[:-1]).text == tokenizer.decode(prompt)
    assert conversation.messages[-1]["content"] == conversation.prompts.content(ids)


def size(conversation: Conversation, text: str) -> int:
    return len(conversation.tokenizer.encode(text, add_special_tokens=False))


def test_every_way_to_go_on_answers_as_if_all_were_read_anew(loaded, talk):
    conversation = talk(loaded, system="Be brief.")
    list(conversation.ask(LONG))
    check(conversation)
    list(conversation.ask("And then?"))
    assert conversation.last.reused >= size(conversation, LONG)  # the caches were kept
    check(conversation)
    list(conversation.retry())
    check(conversation)
    list(conversation.edit("Who was there? " + LONG))
    check(conversation)
    assert conversation.undo().startswith("Who was there?")
    list(conversation.ask("Nobody."))
    check(conversation)
    conversation.system = "Be long."
    list(conversation.ask("Why?"))
    check(conversation)
    conversation.reset()
    list(conversation.ask("Begin."))
    check(conversation)
    assert len(conversation.messages) == 2


def test_a_cache_that_drops_answers_as_if_all_were_read_anew(loaded, talk):
    conversation = talk(loaded, max_kv_size=64, drawn={"max_tokens": 4})
    for question in (LONG, "Who was there? " + LONG):
        before = conversation.cached
        list(conversation.ask(question))
        assert conversation.last.reused == before
        check(conversation)
    assert all(cache.dropped[0] for cache in conversation.caches)
    assert max(cache.kept_tokens for cache in conversation.caches) <= 64
    list(conversation.edit("Nobody."))  # what was dropped is read again
    check(conversation)


def test_the_next_turn_feeds_only_what_is_new(default, talk):
    conversation = talk(default)
    list(conversation.ask(LONG))
    before = conversation.cached
    list(conversation.ask("And then?"))
    assert conversation.last.reused == before
    # The end of the answer's message, the question, and what opens the next answer.
    new = "<|end|>\n<|user|>\nAnd then?<|end|>\n<|assistant|>\n"
    assert conversation.last.fed <= size(conversation, new)


def test_the_last_exchanges_are_edited_without_reading_all_again(loaded, talk):
    conversation = talk(loaded, drawn={"max_tokens": 20}, system=LONG)
    began = []
    for question in ("Who?", "Where?", "When?", "Why?"):
        began.append(conversation.cached)
        list(conversation.ask(question))
    for i in (3, 1):  # each answer is longer than what could be rewound
        conversation.undo()
        list(conversation.ask("What?"))
        assert conversation.last.reused >= began[i]
        check(conversation)
        conversation.undo()
        if i == 3:
            conversation.undo()
    list(conversation.ask("How?"))  # further back than the marks reach
    check(conversation)


@pytest.mark.parametrize("pieces", [0, 5])
def test_an_answer_that_is_stopped_stays_as_far_as_it_came(loaded, talk, pieces):
    conversation = talk(loaded)
    list(conversation.ask(LONG))
    answer = conversation.ask("And then?", on_progress=None)
    if pieces == 0:
        conversation.stop()
        assert list(answer) == [] and conversation.last.reason == "interrupted"
        assert len(conversation.messages) == 2  # as if it had not been asked
    else:
        for _ in range(pieces):
            next(answer, None)  # bytes that are no characters are not shown
        conversation.stop()
        list(answer)
        assert 1 <= conversation.last.generated <= 8
        assert len(conversation.messages) == 4
    list(conversation.ask("Go on."))
    check(conversation)


def test_an_answer_whose_reader_goes_away_leaves_whole_caches(loaded, talk):
    conversation = talk(loaded)
    answer = conversation.ask(LONG)
    next(answer, None)
    answer.close()
    assert conversation.messages[-1]["role"] == "assistant"
    assert length_of(conversation.caches) == conversation.cached
    list(conversation.ask("Go on."))
    check(conversation)


def test_an_error_within_a_step_costs_the_caches_and_no_message(default, talk, monkeypatch):
    conversation = talk(default)
    list(conversation.ask(LONG))
    messages = conversation.messages[:]
    cache = conversation.caches[1]

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(cache, "updates", fail)  # after layer 0 has taken the tokens
    with pytest.raises(MemoryError):
        list(conversation.ask("And then?"))
    assert conversation.messages == messages and conversation.cached == 0
    list(conversation.ask("And then?"))
    check(conversation)


def test_a_stop_while_a_message_is_read_is_heard_between_steps(default, talk):
    conversation = talk(default, drawn={"prefill_step_size": 8})
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            conversation.stop()

    assert list(conversation.ask(LONG, progress)) == []
    assert [done for done, _ in seen] == [8, 16] and conversation.cached == 16
    assert conversation.messages == []
    list(conversation.ask(LONG))
    assert conversation.last.reused == 16
    check(conversation)


def test_a_full_context_is_said_before_anything_changes(default, talk):
    conversation = talk(default)
    list(conversation.ask("Hello."))
    messages, cached = conversation.messages[:], conversation.cached
    with pytest.raises(ContextFullError, match="2048: no room for an answer.*/undo"):
        conversation.ask("word " * 2048)
    assert (conversation.messages, conversation.cached) == (messages, cached)


def test_an_answer_ends_where_the_context_does(tmp_path, talk):
    path = write_llama(tmp_path / "short", max_position_embeddings=60)
    conversation = talk(mlx_delta.load(path, SMALL), drawn={"max_tokens": 60})
    list(conversation.ask("word " * 45))
    assert conversation.last.reason in ("context", "stop")
    assert conversation.last.generated <= 15 and conversation.cached <= 60


def test_without_a_template_an_answer_goes_on_from_its_question(default, talk):
    conversation = talk(default, template=None)
    list(conversation.ask(LONG.strip()))
    check(conversation)
    list(conversation.ask("And then"))
    check(conversation)
    text = conversation._prompt(conversation.messages).text
    first, second = (conversation.messages[i]["content"] for i in (1, 3))
    assert text == f"{LONG.strip()}{first}\n\nAnd then{second}"


def test_a_template_that_changes_what_was_said_is_followed(tmp_path, talk):
    path = write_llama(tmp_path / "chat")
    shorter = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'][:5] }}\n{% endfor %}"
    set_template(path, shorter)
    conversation = talk(mlx_delta.load(path, SMALL))
    for question in ("Hello there", "And then?", "Why?"):
        list(conversation.ask(question))
        check(conversation)


def test_a_sliding_window_that_is_full_is_filled_anew(tmp_path, talk):
    layers = ["full_attention", "sliding_attention", "full_attention"]
    path = write_llama(tmp_path / "sliding", layer_types=layers, sliding_window=32)
    set_template(path, "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    conversation = talk(mlx_delta.load(path, SMALL))
    list(conversation.ask(LONG))
    list(conversation.retry())
    check(conversation)


def test_prepared_caches_hold_the_beginning_of_any_message(default, talk):
    conversation = talk(default, system=LONG)
    conversation.prepare()
    held = conversation.cached
    assert held >= size(conversation, LONG)
    list(conversation.ask("Who?"))
    assert conversation.last.reused == held
    check(conversation)


def test_what_can_not_be_fed_is_refused_at_once(default, talk):
    conversation = talk(default)
    for text in ("half \ud83d", "\udcff"):
        with pytest.raises(ValueError, match=r"holds half a character \('\\ud"):
            conversation.ask(text)
    conversation.system = "word " * 3000
    with pytest.raises(ContextFullError, match="no room"):
        conversation.prepare()
    assert conversation.cached == 0 and conversation.messages == []


def test_copies_go_their_own_ways(default, talk):
    conversation = talk(default, system=LONG)
    conversation.prepare()
    answers = []
    for question in ("Who?", "Where?", "Who?"):
        other = conversation.copy()
        answers.append(said(other.ask(question)))
        assert other.last.reused >= size(other, LONG)
        check(other)
    assert answers[0] == answers[2]
    assert conversation.messages == [] and conversation.cached < other.cached


@pytest.mark.parametrize("steps", [1, 8])
def test_a_draft_model_changes_nothing_but_the_speed(loaded, talk, steps):
    draft = llama_model(SMALL, seed=1, num_hidden_layers=2)
    plain = talk(loaded, drawn={"max_tokens": 20})
    drafter = draft if steps == 1 else loaded[0]  # a bad one and a perfect one
    drafted = talk(loaded, draft_model=drafter, drawn={"max_tokens": 20, "num_draft_tokens": steps})
    for turn in (LONG, "Was it cold?"):  # not a tie of a random model, which any rounding turns
        assert said(drafted.ask(turn)) == said(plain.ask(turn))
    assert drafted.last.reused > size(drafted, LONG)
    assert said(drafted.edit("Why?")) == said(plain.edit("Why?"))
    assert drafted.messages == plain.messages


@pytest.mark.parametrize(
    ("one", "other", "n"), [([], [1], 0), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2)]
)
def test_what_two_texts_share(one, other, n):
    assert in_common(one, other) == in_common(other, one) == n


@pytest.mark.parametrize("call", ["retry", "undo", "edit"])
def test_there_is_nothing_to_take_back_at_the_beginning(default, talk, call):
    conversation = talk(default)
    with pytest.raises(ValueError, match="there is no message yet"):
        getattr(conversation, call)(*(["x"] if call == "edit" else []))
    with pytest.raises(ValueError, match="the message is empty"):
        conversation.ask("  \n")
