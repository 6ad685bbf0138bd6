"""What both trainers start from: the tokenizer, and the texts as tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data import encode_documents, read_text
from recall import NAMES, WORDS
from tokenizer import save_tokenizer, train_tokenizer
from tokenizers import Tokenizer


def prepare(
    work: Path,
    text: Path,
    heldout: Path,
    megabytes: float | None = None,
    vocab_size: int = 4096,
) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """The tokenizer, the training tokens [n] and the held-out tokens [m], made once and then kept.

    Args:
        work: Where they are kept. A tokenizer that lies there already, of another model say, is
            taken as it is.
        text: The training text, .txt or .xz, with form feeds between documents.
        heldout: The text for validation.
        megabytes: No more than this is read of the training text.
        vocab_size: Of the tokenizer, if it is to be made.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokens.npy").exists():
        documents = read_text(text, megabytes)
        if not (work / "tokenizer.json").exists():
            save_tokenizer(train_tokenizer(documents, vocab_size, [*NAMES, *WORDS]), work)
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        np.save(work / "heldout.npy", encode_documents(tokenizer, read_text(heldout)))
        np.save(work / "tokens.npy", encode_documents(tokenizer, documents))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    return tokenizer, np.load(work / "tokens.npy"), np.load(work / "heldout.npy")
