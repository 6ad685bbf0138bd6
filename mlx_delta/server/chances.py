"""Log probabilities as OpenAI's interface has them: one form for chats, one for completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.server import Response


def chat_logprobs(pieces: Sequence[Response], text_of: Callable[[int], str]) -> dict[str, Any]:
    """Of a chat's tokens, each with the likeliest ones in its place.

    Args:
        pieces: One for each token.
        text_of: A token's text.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = text_of(token)
        # A part of a character has bytes of its own, which the text does not show.
        known = "\N{REPLACEMENT CHARACTER}" not in text
        return {
            "id": token,
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if known else None,
        }

    content = [
        {
            **entry(piece.token, piece.logprob),
            "top_logprobs": [entry(token, value) for token, value in _likeliest(piece)],
        }
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    pieces: Sequence[Response], text_of: Callable[[int], str], offset: int
) -> dict[str, Any]:
    """Of a completion's tokens, in lists.

    Args:
        pieces: One for each token.
        text_of: A token's text.
        offset: Characters of the answer before them.
    """
    texts = [text_of(piece.token) for piece in pieces]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [{text_of(token): value for token, value in _likeliest(piece)} for piece in pieces]
    return {
        "tokens": texts,
        "token_logprobs": [piece.logprob for piece in pieces],
        "top_logprobs": top if any(top) else None,
        "text_offset": offsets,
    }


def _likeliest(piece: Response) -> Sequence[tuple[int, float]]:
    """The likeliest tokens in a token's place, as ``sampling.probabilities`` finds them."""
    found: Any = piece.top_tokens
    return found  # type: ignore[no-any-return]
