"""A conversation with a model, whose caches are kept from turn to turn.

Every answer begins with the whole conversation as tokens. What the caches hold of them already
stays; where they hold something else (an edited message, another system prompt) they are taken
back exactly to where the two part, and the rest is fed.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.config import DeltaConfig
from mlx_delta.generate import stream_generate
from mlx_delta.generate.checks import check_prompt
from mlx_delta.generate.memory import check_memory
from mlx_delta.models.anatomy import context_length
from mlx_delta.prefixes.chain import in_common

from .kept import KeptCaches
from .options import ContextFullError, Options, Progress, Turn
from .prompt import Prompt, PromptMaker, end_of_paragraph
from .whole import WholeText


@dataclass
class _Running:
    """An answer that is being made: the tokens fed and drawn, and when."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    reused: int = 0
    fed: int = 0
    started: float = field(default_factory=time.perf_counter)
    answering: float = 0.0
    reason: str = "interrupted"


class Conversation:
    """Messages, and the caches that go with them.

    It belongs to the thread that it is made on, as the model does; only :meth:`stop` may be called
    from elsewhere.

    Args:
        model: From :func:`mlx_delta.load`.
        tokenizer: From :func:`mlx_delta.load`. Without a chat template the messages follow each
            other as plain text, and an answer ends with its paragraph.
        system: The system prompt.
        options: How answers are drawn.
        draft_model: Guesses tokens ahead; shares the tokenizer.
        template: Further arguments of the chat template; ``None`` to do without one.
        max_kv_size: Tokens that the model's caches keep; what is older is forgotten, but for the
            first.

    Attributes:
        messages: Of ``role`` and ``content``, the system prompt left out.
        last: What the last answer took.
        setting_before: The setting of the delta before it was switched off.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        system: str | None = None,
        options: Options | None = None,
        draft_model: nn.Module | None = None,
        template: dict[str, Any] | None = {},  # noqa: B006 (read only)
        max_kv_size: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.options = options or Options()
        self.draft_model = draft_model
        self.messages: list[dict[str, str]] = []
        self.last: Turn | None = None
        self.setting_before: DeltaConfig | None = None
        self.prompts = PromptMaker(tokenizer, template)
        self._kept = KeptCaches(model, draft_model, max_kv_size)
        self._stop = threading.Event()

    # What is known of it.

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, where its configuration says so."""
        return context_length(self.model)

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far, the beginning of the next message not counted."""
        if not self.messages:
            return 0
        return len(self._prompt(self.messages, answer=False).tokens)

    @property
    def cached(self) -> int:
        """Tokens that the caches hold."""
        return len(self._kept.known)

    @property
    def caches(self) -> list[Any]:
        """The model's caches; none before anything was fed."""
        return self._kept.caches

    @property
    def draft_caches(self) -> list[Any]:
        """The draft model's."""
        return self._kept.draft_caches

    # What changes it.

    def ask(
        self, text: str, on_progress: Callable[[int, int], None] | None = None
    ) -> Iterator[str]:
        """Answer a message; yields the answer in pieces that end in whole characters.

        The message and the answer, as far as it came, join the conversation when the answer ends.
        One that ends before its first token leaves nothing behind.

        Args:
            text: The message.
            on_progress: Called with the tokens fed and those to be fed.

        Raises:
            ContextFullError: There is no room for an answer; nothing has changed then.
            ValueError: The message is empty, or the template refuses it.
            MemoryError: The caches would not fit the memory that is free.
        """
        if not text.strip():
            raise ValueError("the message is empty.")
        messages = [*self.messages, {"role": "user", "content": text}]
        return self._answer(messages, on_progress)

    def retry(self, on_progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
        """Answer the last message anew, in place of the answer that there is; see :meth:`ask`."""
        asked = self._last_question()
        return self._answer(self.messages[: asked + 1], on_progress)

    def edit(
        self, text: str, on_progress: Callable[[int, int], None] | None = None
    ) -> Iterator[str]:
        """Put another message in the place of the last one, and answer it; see :meth:`ask`."""
        asked = self._last_question()
        if not text.strip():
            raise ValueError("the message is empty.")
        messages = [*self.messages[:asked], {"role": "user", "content": text}]
        return self._answer(messages, on_progress)

    def undo(self) -> str:
        """Take the last message and its answer back; returns the message.

        Raises:
            ValueError: There is none.
        """
        asked = self._last_question()
        text = self.messages[asked]["content"]
        del self.messages[asked:]
        return text

    def reset(self) -> None:
        """Begin anew, with the same system prompt."""
        self.messages = []
        self.last = None

    def forget(self) -> None:
        """Drop the caches; what is needed of them is fed again. After another setting.

        Raises:
            ValueError: The model's setting can't do with so few tokens; nothing is changed then.
        """
        self._kept.check_size()
        self._kept.forget()

    def stop(self) -> None:
        """End the answer that is being made, after its next token. From any thread."""
        self._stop.set()

    def prepare(self) -> None:
        """Feed what any next message begins with, so that its answer comes sooner.

        Raises:
            ContextFullError: There is no room for a message; nothing is fed then.
            MemoryError: The caches would not fit the memory that is free.
        """
        tokens = self._common()
        self._check(tokens)
        self._stop.clear()
        with self._kept.whole_or_nothing():
            step = self.options.prefill_step_size
            for _ in self._kept.feed(tokens, len(tokens), step, self._stop.is_set):
                pass

    def copy(self) -> Conversation:
        """Another conversation that goes on from here; the two then differ."""
        other = copy.copy(self)
        other.messages = [dict(message) for message in self.messages]
        other.prompts = copy.copy(self.prompts)
        other._kept = self._kept.copy()
        other._stop = threading.Event()
        return other

    # How it is done.

    def _last_question(self) -> int:
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                return i
        raise ValueError("there is no message yet.")

    def _prompt(self, messages: list[dict[str, str]], answer: bool = True) -> Prompt:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.prompts.make([*first, *messages], answer)

    def _common(self) -> list[int]:
        """The tokens that two different next messages begin with alike."""
        one, other = (
            self._prompt([*self.messages, {"role": "user", "content": text}])
            for text in ("Alone", "Beside")
        )
        return one.tokens[: in_common(one.tokens, other.tokens)]

    def _answer(
        self, messages: list[dict[str, str]], on_progress: Progress | None
    ) -> Iterator[str]:
        """Check what can be checked before anything changes; the rest as the answer is read."""
        prompt = self._prompt(messages)
        room = self._check(prompt.tokens)
        self._stop.clear()
        return self._run(messages, _Running(prompt), room, on_progress)

    def _check(self, tokens: list[int]) -> int:
        """How many tokens may follow these, if they can be fed at all."""
        room = self._room(len(tokens))
        if tokens:
            check_prompt("chat", self.model, tokens)
            options = {"max_kv_size": self._kept.max_kv_size}
            check_memory("chat", self.model, len(tokens), options)
        return room

    def _run(
        self,
        messages: list[dict[str, str]],
        running: _Running,
        room: int,
        on_progress: Progress | None,
    ) -> Iterator[str]:
        tokens, step = running.prompt.tokens, self.options.prefill_step_size
        end, stopped = len(tokens) - 1, self._stop.is_set
        try:
            with self._kept.whole_or_nothing():
                for fed in self._kept.feed(tokens, end, step, stopped, on_progress):
                    running.reused, running.fed = fed
                if not stopped():
                    yield from self._draw(running, room)
        finally:
            if running.ids:
                self.prompts.say(running.prompt, running.ids)
                content = self.prompts.content(running.ids)
                self.messages = [*messages, {"role": "assistant", "content": content}]
            now = time.perf_counter()
            began = running.answering or now
            self.last = Turn(
                reused=running.reused,
                fed=running.fed,
                generated=len(running.ids),
                feed_seconds=began - running.started,
                answer_seconds=now - began,
                reason=running.reason,
            )

    def _room(self, tokens: int) -> int:
        """How many tokens the answer may have."""
        context, most = self.context, self.options.max_tokens
        if context is None:
            return most
        if tokens >= context:
            raise ContextFullError(
                f"the conversation would have {tokens} tokens, and the model's context holds "
                f"{context}: no room for an answer. /undo takes the last exchange back, /reset "
                "begins anew; a shorter message may fit."
            )
        return min(most if most > 0 else context, context - tokens)

    def _draw(self, running: _Running, room: int) -> Iterator[str]:
        """The answer, once all but the prompt's last token is fed."""
        prompt, whole = running.prompt, WholeText()
        running.answering = time.perf_counter()
        options: dict[str, Any] = {"sampler": self._sampler(), "max_tokens": room}
        if self.draft_model is not None:
            options |= {
                "draft_model": self.draft_model,
                "num_draft_tokens": self.options.num_draft_tokens,
            }
        responses = stream_generate(
            self.model,
            self.tokenizer,
            prompt.tokens[-1:],
            prompt_cache=[*self.caches, *self.draft_caches],
            **options,
        )
        text, cut = "", True
        try:
            for response in responses:
                running.fed += not running.ids
                running.ids.append(response.token)
                piece, ends = self._within_paragraph(text, response.text)
                text += piece
                if shown := whole.add(piece):
                    yield shown
                if ends or response.finish_reason == "stop":
                    running.reason, cut = "stop", False
                    break
                if response.finish_reason == "length":
                    full = room != self.options.max_tokens
                    running.reason = "context" if full else "length"
                    break
                if self._stop.is_set():
                    break
        except GeneratorExit:  # whoever read the answer has gone
            responses.close()
            self._kept.settle([*prompt.tokens, *running.ids])
            raise
        responses.close()
        self._kept.settle([*prompt.tokens, *running.ids])
        if shown := whole.end(cut):
            yield shown

    def _within_paragraph(self, text: str, piece: str) -> tuple[str, bool]:
        """The piece up to the end of the answer's paragraph, and whether that is in it."""
        end = None if self.prompts.template is not None else end_of_paragraph(text + piece)
        return (piece, False) if end is None else (piece[: max(0, end - len(text))], True)

    def _sampler(self) -> Callable[[mx.array], mx.array]:
        o, tokenizer = self.options, self.tokenizer
        return make_sampler(
            o.temp,
            o.top_p,
            o.min_p,
            1,
            top_k=o.top_k,
            xtc_probability=o.xtc_probability,
            xtc_threshold=o.xtc_threshold,
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        )
