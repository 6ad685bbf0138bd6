"""What a server serves, and how much of it one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MB = 10**6


@dataclass(frozen=True)
class Served:
    """A model as requests see it, and the limits of the door.

    The defaults are for whoever puts a server together from its parts: they know nothing of the
    model and refuse only what no model could do.

    Attributes:
        names: What the model may be called in a request, the first in lists; any name if empty.
        context: Tokens of prompt and answer together, where the model says so.
        vocabulary: Number of tokens.
        longest_piece: Characters of the longest.
        most_draft_tokens: That can be taken back.
        max_body: Bytes of a request.
        max_prompt: Tokens of a prompt.
        max_answer: The largest ``max_tokens`` that may be asked for.
        max_queue: Requests that wait, beside those that are worked on.
        max_connections: At one time, silent ones included.
        seconds: That a client may take to send a request, or to take a piece of an answer.
        api_key: That every request but those for ``/health`` must bring.
        origins: Of web pages that may use the server; ``*`` is all.
        local_only: Refuse requests for other names than this machine's own, with which a web page
            could pass itself off as local.
    """

    names: tuple[str, ...] = ()
    context: int | None = None
    vocabulary: int | None = None
    longest_piece: int | None = None
    most_draft_tokens: int | None = None
    max_body: int = 8 * MB
    max_prompt: int | None = None
    max_answer: int = 1 << 17
    max_queue: int = 64
    max_connections: int = 256
    seconds: float = 60.0
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    local_only: bool = False

    @property
    def name(self) -> str:
        """The model's name in lists."""
        return self.names[0] if self.names else "default_model"

    @property
    def longest_prompt(self) -> int | None:
        """Tokens that a prompt may have: by the limit, and so that one of an answer fits."""
        bounds = [n for n in (self.context, self.max_prompt) if n is not None]
        return min(bounds, default=None)

    def room(self, prompt_tokens: int, max_tokens: int) -> int:
        """How many tokens of an answer fit the context; at least the one after the prompt."""
        if self.context is None:
            return max_tokens
        return min(max_tokens, max(1, self.context - prompt_tokens))
