"""Building a ``tokenizer.json`` from what sentencepiece and GGUF files hold.

sentencepiece's BPE merges the pair whose joined piece has the highest score; ``tokenizers``
merges by rank. Ranking every possible split of every piece by the piece's score gives the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from .errors import ConvertError
from .files import dump_json
from .splitting import Rule

# No known piece comes near: the longest in use are runs of some hundred spaces.
MAX_PIECE = 1024
MAX_PIECES = 1 << 21


class PieceType(IntEnum):
    """Kinds of pieces, numbered as sentencepiece and GGUF do."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, and the special ones.

    Attributes:
        pieces: Text of each id.
        scores: Of each id; empty for vocabularies with merges.
        types: Of each id.
        bos: Id that starts a text, if any.
        eos: Id that ends one, if any.
        add_bos: Whether encoding a text starts with ``bos``.
    """

    pieces: list[str]
    scores: list[float]
    types: list[int]
    bos: int | None
    eos: int | None
    add_bos: bool

    def check(self, where: str) -> None:
        """Check what the builders rely on.

        Raises:
            ConvertError: A piece is repeated or too long, a number is missing or out of range.
        """
        count = len(self.pieces)
        if not 1 <= count <= MAX_PIECES or len(self.types) != count:
            raise ConvertError(f"{where} has {count} pieces and {len(self.types)} types.")
        if self.scores and len(self.scores) != count:
            raise ConvertError(f"{where} has {count} pieces and {len(self.scores)} scores.")
        if len(set(self.pieces)) != count:
            raise ConvertError(f"{where} holds a piece twice.")
        if max(map(len, self.pieces)) > MAX_PIECE or not all(self.pieces):
            raise ConvertError(f"{where} holds an empty piece or one of over {MAX_PIECE} signs.")
        if not all(map(math.isfinite, self.scores)) or not set(self.types) <= set(PieceType):
            raise ConvertError(f"{where} holds a score or a type that means nothing.")
        for name, value in (("bos", self.bos), ("eos", self.eos)):
            if value is not None and not 0 <= value < count:
                raise ConvertError(f"{where} has the {name} id {value} but {count} pieces.")


def spm_tokenizer(
    vocabulary: Vocabulary, add_prefix: bool = True, strip: bool = False
) -> Tokenizer:
    """A fast tokenizer that splits as sentencepiece's BPE does.

    Args:
        vocabulary: Checked; with scores.
        add_prefix: Whether a text gets a space in front.
        strip: Whether spaces at the ends are removed and runs of them made one.
    """
    # A user's own pieces are found in the text before anything else, so with its spaces.
    ids = {
        piece.replace("▁", " ") if kind == PieceType.USER_DEFINED else piece: i
        for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
    }
    unknown = next(
        (
            p
            for p, t in zip(vocabulary.pieces, vocabulary.types, strict=True)
            if t == PieceType.UNKNOWN
        ),
        None,
    )
    has_bytes = PieceType.BYTE in vocabulary.types
    model = BPE(
        ids,
        _merges(vocabulary, ids),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if strip:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if add_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    _add_special(tokenizer, vocabulary)
    return tokenizer


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of every ordinary piece into two others, best score first."""
    ranked = []
    known = ids.get
    for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True)):
        if kind != PieceType.NORMAL or len(piece) < 2:
            continue
        score = -vocabulary.scores[i]
        pairs = [
            (left, right)
            for k in range(1, len(piece))
            if (left := known(piece[:k])) is not None and (right := known(piece[k:])) is not None
        ]
        ranked += [(score, left, right) for left, right in sorted(pairs)]
    ranked.sort(key=lambda entry: entry[0])
    pieces = vocabulary.pieces
    return [(pieces[left], pieces[right]) for _, left, right in ranked]


def bpe_tokenizer(vocabulary: Vocabulary, merges: list[str], rule: Rule) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's and Llama 3's.

    Raises:
        ConvertError: A merge is broken.
    """
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    pairs = []
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not separator or left not in ids or right not in ids or left + right not in ids:
            raise ConvertError(f"the merge {merge[:60]!r} is not of its own vocabulary")
        pairs.append((left, right))
    tokenizer = Tokenizer(BPE(ids, pairs, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, vocabulary)
    return tokenizer


def _add_special(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Mark tokens that stand for themselves, and put ``bos`` in front of texts."""
    special, plain = [], []
    for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True):
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN):
            special.append(AddedToken(piece, special=True, normalized=False))
        elif kind == PieceType.USER_DEFINED:
            plain.append(AddedToken(piece.replace("▁", " "), special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    if vocabulary.add_bos and vocabulary.bos is not None:
        piece = vocabulary.pieces[vocabulary.bos]
        tokenizer.post_processor = TemplateProcessing(
            single=[piece, "$A"],
            pair=[piece, "$A", f"{piece}:1", "$B:1"],
            special_tokens=[(piece, vocabulary.bos)],
        )


def tokenizer_files(
    tokenizer: Tokenizer, vocabulary: Vocabulary, template: str | None = None
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "clean_up_tokenization_spaces": False,
    }
    for name, value in (("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos)):
        if value is not None:
            config[name] = vocabulary.pieces[value]
    unknown = [
        piece
        for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True)
        if kind == PieceType.UNKNOWN
    ]
    if unknown:
        config["unk_token"] = unknown[0]
    if template is not None:
        config["chat_template"] = template
    text = tokenizer.to_str().encode()
    return {"tokenizer.json": text, "tokenizer_config.json": dump_json(config)}
