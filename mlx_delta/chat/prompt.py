"""From messages to the tokens that the model is fed, so that what it was fed before stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.generate.checks import encode_prompt
from mlx_delta.generate.conversation import render

MOST_SAID = 64  # answers whose tokens are remembered
BETWEEN = "\n\n"  # paragraphs: messages and answers, where there is no template


@dataclass(frozen=True)
class Prompt:
    """A text and its tokens.

    Attributes:
        text: It.
        tokens: Their ids.
    """

    text: str
    tokens: list[int]


class PromptMaker:
    """Makes prompts of messages.

    Args:
        tokenizer: The model's.
        template: Further arguments of its chat template; ``None`` to do without one.
    """

    def __init__(self, tokenizer: TokenizerWrapper, template: dict[str, Any] | None):
        self.tokenizer = tokenizer
        self.template = template if tokenizer.has_chat_template else None
        self._said: list[Prompt] = []

    def make(self, messages: list[dict[str, str]], answer: bool = True) -> Prompt:
        """The prompt of a conversation.

        A model's own words need not be cut into the tokens that a tokenizer would cut them into.
        Where the text goes on from one that was said, the tokens of that are kept.

        Args:
            messages: Of ``role`` and ``content``.
            answer: Whether the beginning of an answer is to follow.

        Raises:
            ValueError: A message holds half a character, or the template refuses one.
        """
        check_text("".join(message["content"] for message in messages))
        if self.template is not None:
            text = render(
                self.tokenizer, messages, self.template, "answered" if answer else "closed"
            )
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            text = _plain(messages)
            tokens = encode_prompt(self.tokenizer, text)
        found = [said for said in self._said if text.startswith(said.text)]
        said = max(found, key=lambda said: len(said.text), default=Prompt("", []))
        if said.tokens and len(text) > len(said.text):
            rest = text[len(said.text) :]
            if tokens[: len(said.tokens)] != said.tokens:
                tokens = [*said.tokens, *self.tokenizer.encode(rest, add_special_tokens=False)]
        return Prompt(text, tokens)

    def say(self, prompt: Prompt, ids: list[int]) -> None:
        """Remember by which tokens a prompt was answered."""
        said = Prompt(prompt.text + self.tokenizer.decode(ids), [*prompt.tokens, *ids])
        self._said = [*self._said, said][-MOST_SAID:]

    def content(self, ids: list[int]) -> str:
        """The text of an answer, its end token left out; without a template, its paragraph."""
        if ids and ids[-1] in self.tokenizer.eos_token_ids:
            ids = ids[:-1]
        text: str = self.tokenizer.decode(ids)
        text = text.rstrip("\ufffd")  # a character that was cut
        return text if self.template is not None else text[: end_of_paragraph(text)]


def check_text(text: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        ValueError: It holds half a character (a lone surrogate).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"the message holds half a character ({half}), no text.") from None


def end_of_paragraph(text: str) -> int | None:
    """Where the first paragraph ends that is not empty; ``None`` if it is not over."""
    end = text.find(BETWEEN, len(text) - len(text.lstrip()))
    return end if end > 0 else None


def _plain(messages: list[dict[str, str]]) -> str:
    """The messages as one text; an answer goes on from its question."""
    text = ""
    for message in messages:
        begins = message["role"] != "assistant" and text
        text += (BETWEEN if begins else "") + message["content"]
    return text
