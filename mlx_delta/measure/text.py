"""Texts that tasks are made of, as tokens of any tokenizer."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

from mlx_delta.models.anatomy import context_length as context_length  # for those who make texts

BUNDLED_TEXT = Path(__file__).parent / "texts" / "hound.txt"

_ANCHOR = "a"


def read_text(file: str | Path) -> str:
    """A text file in UTF-8, or one compressed with xz.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not text, or empty.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"[read_text] there is no text file {str(file)!r}.")
    try:
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as stream:
            text = str(stream.read())
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"[read_text] {file} is not UTF-8 text: {error}.") from error
    if not text.strip():
        raise ValueError(f"[read_text] {file} is empty.")
    return text


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added; documents may be separated by form feeds."""
    ids: list[int] = []
    for document in text.split("\f"):
        ids += tokenizer.encode(document, add_special_tokens=False)
    return ids


def encode_piece(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece as it stands within a text.

    sentencepiece tokenizers put a space before whatever they are given; after a letter they don't.
    """
    before = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    ids = list(tokenizer.encode(_ANCHOR + text, add_special_tokens=False))
    if ids[: len(before)] == before and len(ids) > len(before):
        return ids[len(before) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: BOS, or nothing."""
    ids = tokenizer.encode(_ANCHOR, add_special_tokens=True)
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


def prompt_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """The first tokens of a text, which begins again as often as needed."""
    first = first_tokens(tokenizer)
    # Fewer characters than that make up a token, so the rest of a book need not be encoded.
    body = encode_text(tokenizer, text[: 16 * length])
    if not body:
        raise ValueError("[prompt_ids] the text has no tokens; give another --text.")
    return (first + body * (length // len(body) + 1))[:length]
