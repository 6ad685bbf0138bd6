"""One request on its way: what the two threads that work on it tell each other.

The thread of its connection waits for pieces of the answer; the engine's thread makes them and
looks, at every step, whether the client is still there.
"""

from __future__ import annotations

import dataclasses
import select
import socket
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any

from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
)

from .refusal import Refused, failure
from .stop_words import StopWords

_LOOK = 1.0  # seconds between two looks at whether the engine lives
_SILENCE = 15.0  # seconds after which a client that waits gets a sign of life


@dataclasses.dataclass
class Request(CompletionRequest):
    """mlx-lm's request, with the connection that it came by and the job that is made of it."""

    connection: socket.socket | None = None
    job: Job | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """A request that was admitted.

    Args:
        request: What is asked for.
        args: How.
        context: mlx-lm's, for its handler: the prompt, and how to read tool calls.
        segments: The prompt, cut where its caches are worth keeping.
        kinds: Of the segments: ``system``, ``user``, ``assistant``.
        parser: Of calls of tools, which the model's tokenizer brings.
    """

    request: CompletionRequest
    args: GenerationArguments
    context: GenerationContext
    segments: list[list[int]]
    kinds: list[str]
    parser: Any = None

    def __post_init__(self) -> None:
        self.events: Queue[Any] = Queue()
        self.cancelled = False
        self.reason: str | None = None  # why the answer ended
        self.spoken: list[Response] = []  # pieces since the client was last sent one
        self.unread: list[str] = []  # calls of tools that could not be read
        self.called = False  # whether one could
        self._stops = StopWords(self.args.stop_words)
        self._detokenizer: Any = None

    # The engine's thread.

    def start(self, detokenizer: Any, cached: int) -> None:
        """The job's turn has come, with so many tokens of the prompt known."""
        self._detokenizer = detokenizer
        self.context.prompt_cache_count = cached
        self.progress(0, len(self.context.prompt) - cached)

    def progress(self, done: int, total: int) -> None:
        """So many of the prompt's tokens are read."""
        self.events.put((done, total))

    def text_of(self, token: int, reason: str | None) -> str:
        """The text that a token adds; a stop token adds what the ones before it had left open."""
        if reason != "stop":
            self._detokenizer.add_token(token)
        if reason is not None:
            self._detokenizer.finalize()
        return str(self._detokenizer.last_segment)

    def shown(self, text: str, reason: str | None) -> tuple[str, str | None]:
        """Of a piece's text what can be shown, and why the answer ends with it, if it does."""
        shown, stopped = self._stops.feed(text)
        if stopped:
            return shown, "stop"
        return (shown, None) if reason is None else (shown + self._stops.flush(), reason)

    def say(
        self, shown: str, token: int, reason: str | None, logprob: float = 0.0, top: Any = ()
    ) -> None:
        """Hand a piece on."""
        self.events.put(Response(shown, token, logprob, reason, top))

    def read_call(self, text: str, tools: Any) -> Any:
        """Read a call of a tool as mlx-lm does; one that can't be read is kept as text.

        Raises:
            ValueError: It can't be read.
        """
        try:
            parsed = self.parser(text, tools)
            for call in parsed if isinstance(parsed, list) else [parsed]:
                if not isinstance(call["name"], str) or "arguments" not in call:
                    raise ValueError("it names no function or has no arguments")
        except Exception as error:  # a parser meets whatever a model writes
            self.unread.append(text)
            raise ValueError(f"not a call of a tool: {error!r}") from error
        self.called = True
        return parsed

    def fail(self, error: Exception | Refused) -> None:
        """End the answer with an error."""
        self.events.put(error if isinstance(error, Refused) else failure(error))

    def leave(self) -> None:
        """The client went away; its thread is told, lest it waits for ever."""
        self.fail(Refused(499, "The client left."))

    @property
    def is_gone(self) -> bool:
        """Whether nobody waits for the answer: it was given up, or the client has hung up."""
        connection = getattr(self.request, "connection", None)
        if not self.cancelled and connection is not None:
            self.cancelled = _hung_up(connection)
        return self.cancelled

    # The connection's thread.

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.cancelled = True

    def pieces(
        self, report: Callable[[int, int], None] | None, lives: Callable[[], bool]
    ) -> Iterator[Response]:
        """The answer, piece by piece.

        The last one says ``length`` whatever the reason: that lets mlx-lm's handler show what it
        held back as the possible begin of a tool call. ``reason`` holds the true one.

        Args:
            report: Takes how many tokens of the prompt are read, of how many.
            lives: Whether the engine does.

        Raises:
            Refused: The answer ended with an error.
        """
        try:
            while self.reason is None:
                event = self._next(report, lives)
                if isinstance(event, Refused):
                    raise event
                if isinstance(event, tuple):
                    if report is not None:
                        report(*event)
                    continue
                self.reason = event.finish_reason
                self.spoken.append(event)
                if self.reason is not None:
                    event = dataclasses.replace(event, finish_reason="length")
                yield event
        finally:
            self.cancel()

    def wait(self, seconds: float, lives: Callable[[], bool]) -> None:
        """Wait for the job's turn, so that what goes wrong before it has a status of its own.

        Raises:
            Refused: It went wrong.
        """
        event = self._next(None, lives, seconds)
        if isinstance(event, Refused):
            raise event

    def _next(
        self,
        report: Callable[[int, int], None] | None,
        lives: Callable[[], bool],
        seconds: float | None = None,
    ) -> Any:
        """The next event; after ``seconds`` without one, nothing."""
        waited = 0.0
        while True:
            try:
                return self.events.get(timeout=_LOOK)
            except Empty:
                waited += _LOOK
            if not lives():
                raise Refused(503, "The server's generation has ended; restart it.")
            if seconds is not None and waited >= seconds:
                return None
            if report is not None and waited % _SILENCE == 0:
                report(0, len(self.context.prompt))


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other end of a connection is closed: without waiting, and reading nothing."""
    try:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0)) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):  # reset, or closed on this side
        return True
