"""How a conversation's answers are drawn, and what each of them took."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_delta.generate.flags import BOUNDS

Progress = Callable[[int, int], None]  # given the tokens fed, and those to be fed


class ContextFullError(ValueError):
    """The conversation has no room for an answer any more."""


@dataclass
class Options:
    """How answers are drawn, in mlx-lm's terms; may change from turn to turn.

    Attributes:
        temp: Temperature; 0 takes the likeliest token.
        top_p: Share of the probability that is drawn from.
        min_p: Least probability, as a share of the likeliest token's.
        top_k: Number of tokens that are drawn from; 0 for all.
        xtc_probability: How often the likeliest tokens are left out.
        xtc_threshold: Which those are.
        max_tokens: Of an answer.
        prefill_step_size: Tokens fed at a time; an answer can be stopped between them.
        num_draft_tokens: Tokens that a draft model guesses at a time.

    Raises:
        ValueError: A value is out of its range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    max_tokens: int = 512
    prefill_step_size: int = 512
    num_draft_tokens: int = 3

    def __post_init__(self) -> None:
        """Refuse what mlx-lm would take and fail with later."""
        if type(self.max_tokens) is not int or self.max_tokens == 0 or self.max_tokens < -1:
            raise ValueError(f"max_tokens must be positive (or -1) but got {self.max_tokens!r}.")
        for name, value in vars(self).items():
            least, most = BOUNDS.get(name, (-math.inf, math.inf))
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most:.15g} but got {value}.")


@dataclass(frozen=True)
class Turn:
    """What an answer took.

    Attributes:
        reused: Tokens that the caches held already.
        fed: Tokens that were fed before the answer.
        generated: Tokens of the answer.
        feed_seconds: For the former.
        answer_seconds: For the latter.
        reason: ``"stop"``, ``"length"``, ``"context"`` or ``"interrupted"``.
    """

    reused: int
    fed: int
    generated: int
    feed_seconds: float
    answer_seconds: float
    reason: str
