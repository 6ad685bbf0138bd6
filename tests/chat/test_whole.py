"""What is shown ends in a whole character, however the tokens cut it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, NaiveStreamingDetokenizer
from mlx_lm.utils import load_tokenizer

from mlx_delta.chat.whole import WholeText, harmless

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
FLAG = "\U0001f1eb\U0001f1f7"
WAVE = "\U0001f44b\U0001f3fd"
KEYCAP = "1\ufe0f\u20e3"
WALES = "\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f"


def shown(pieces, cut=False) -> list[str]:
    whole = WholeText()
    return [x for x in [*(whole.add(p) for p in pieces), whole.end(cut)] if x]


@pytest.mark.parametrize("picture", [FAMILY, FLAG, WAVE, WALES, "\u2764\ufe0f"])
def test_a_picture_comes_as_one_however_it_is_cut(picture):
    assert shown(f"a{picture}b") == ["a", picture + "b"] or shown(f"a{picture}b") == [
        "a",
        picture,
        "b",
    ]
    assert shown(picture * 3) == [picture] * 3


def test_a_key_cap_is_not_shown_before_it_is_one():
    assert shown(["1\ufe0f", "\u20e3", "!"]) == [KEYCAP + "!"] or KEYCAP in shown(
        ["1\ufe0f", "\u20e3", "!"]
    )


def test_letters_come_at_once():
    assert shown("It is 9 o'clock\n") == list("It is 9 o'clock\n")
    assert shown(["na", "i\u0308", "ve"]) == ["na", "i\u0308", "ve"]


@given(st.lists(st.text(alphabet=["a", "1", "\u200d", "\ufe0f", *FAMILY, *FLAG, *WAVE, " "])))
def test_nothing_is_lost_and_nothing_is_added(pieces):
    assert "".join(shown(pieces)) == "".join(pieces)


@pytest.mark.parametrize(
    ("text", "left"),
    [("ab\ufffd", "ab"), ("ab\ufffd\ufffd", "ab"), ("\ufffdab", "\ufffdab")],
    ids=["half a character", "two halves", "within"],
)
def test_what_was_cut_off_within_a_character_is_dropped(text, left):
    whole = WholeText()
    first = whole.add("ab") if text.startswith("ab") else ""
    rest = whole.add(text.removeprefix("ab")) if first else whole.add(text)
    assert first + (rest + whole.end(cut=True)).rstrip("\ufffd") == left


@pytest.mark.parametrize("detokenizer", [BPEStreamingDetokenizer, NaiveStreamingDetokenizer])
def test_every_byte_a_token_of_its_own(template_path, detokenizer):
    tokenizer = load_tokenizer(template_path)
    text = f"Grüße, 你好! {FAMILY}{FLAG} ok {WAVE}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    streamed, whole, pieces = detokenizer(tokenizer._tokenizer), WholeText(), []
    for token in ids:
        streamed.add_token(token)
        pieces.append(whole.add(streamed.last_segment))
    streamed.finalize()
    pieces += [whole.add(streamed.last_segment), whole.end()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [p for p in pieces if FAMILY[0] in p] == [FAMILY]


def test_control_characters_are_shown_and_not_obeyed():
    text = "a\x1b[2Jb\x07\x9b31m\r\nc\td\x7f"
    assert harmless(text) == "a\u241b[2Jb\u2407\\x9b31m\nc\td\u2421"
