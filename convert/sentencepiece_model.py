"""Checkpoints with nothing but a sentencepiece ``tokenizer.model``: a fast tokenizer from it.

The file is read here first, strictly, because what a tokenizer needs is not all in
sentencepiece's interface; then the tokenizer that was built is compared with sentencepiece.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from .errors import ConvertError
from .tokenizer_build import PieceType, Vocabulary, spm_tokenizer, tokenizer_files

BPE_MODEL = 2
TEXTS = (
    "Hello world",
    " leading and  double   spaces, and trailing ",
    "The quick brown fox jumps over the lazy dog. 0123456789 3.14159",
    "def f(x):\n    return x + 1\n\n\tif True: pass",
    "Grüße aus Köln, déjà vu, naïve café, señor",
    "Привет, как дела? 你好，世界！ こんにちは 안녕하세요 مرحبا",
    "emoji 🙂🚀 and \u200bzero width, tabs\tand\nnewlines\r\n",
    "aaaaaaaaaaaaaaaa ababababab mississippi",
    "",
    " ",
    "a",
)


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int, bytes | int]]:
    """The fields of a protocol buffer message: (number, wire type, value).

    https://protobuf.dev/programming-guides/encoding
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 70, 7):
            if position >= len(data):
                break
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ConvertError(f"{where} is truncated or not a sentencepiece model.")

    while position < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, wire, varint()
            continue
        if wire not in (1, 2, 5) or number == 0:
            raise ConvertError(f"{where} is not a sentencepiece model.")
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        if size > len(data) - position:
            raise ConvertError(f"{where} is truncated or not a sentencepiece model.")
        yield number, wire, data[position : position + size]
        position += size


def _message(data: bytes, where: str) -> dict[int, bytes | int]:
    """The last value of each field."""
    return {number: value for number, _, value in _fields(data, where)}


def _flag(values: dict[int, bytes | int], number: int, default: bool) -> bool:
    value = values.get(number, default)
    return bool(value) if isinstance(value, int) else default


def _id(values: dict[int, bytes | int], number: int, default: int) -> int | None:
    """An id; -1, written as a 64-bit two's complement, is none."""
    value = values.get(number, default)
    return value if isinstance(value, int) and value < 1 << 31 else None


def build_tokenizer(data: bytes, where: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json for a ``tokenizer.model``.

    Raises:
        ConvertError: The file is broken, of a kind that can't be rebuilt, or the result does
            not agree with sentencepiece.
    """
    pieces, scores, types = [], [], []
    trainer: dict[int, bytes | int] = {}
    normalizer: dict[int, bytes | int] = {}
    for number, wire, value in _fields(data, where):
        if number in (1, 2, 3) and (wire != 2 or not isinstance(value, bytes)):
            raise ConvertError(f"{where} is not a sentencepiece model.")
        if number == 1:
            assert isinstance(value, bytes)
            entry = _message(value, where)
            text, score = entry.get(1, b""), entry.get(2, b"\0\0\0\0")
            if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
                raise ConvertError(f"{where} holds a broken piece.")
            try:
                pieces.append(text.decode("utf-8"))
            except UnicodeDecodeError:
                raise ConvertError(f"{where} holds a piece that is not UTF-8.") from None
            scores.append(struct.unpack("<f", score)[0])
            kind = entry.get(3, 1)
            types.append(kind if isinstance(kind, int) else 0)
        elif number == 2:
            assert isinstance(value, bytes)
            trainer = _message(value, where)
        elif number == 3:
            assert isinstance(value, bytes)
            normalizer = _message(value, where)
    if trainer.get(3, 1) != BPE_MODEL:
        raise ConvertError(
            f"{where} is not a BPE model, which Llama-like models use; give a directory with a "
            "tokenizer.json with --tokenizer-from."
        )
    if normalizer.get(2) or not _flag(normalizer, 5, True) or _flag(trainer, 24, False):
        raise ConvertError(
            f"{where} normalizes text in a way that can't be rebuilt; give a directory with a "
            "tokenizer.json with --tokenizer-from."
        )
    bos, eos = _id(trainer, 41, 1), _id(trainer, 42, 2)
    vocabulary = Vocabulary(pieces, scores, types, bos, eos, add_bos=bos is not None)
    vocabulary.check(where)
    prefix, strip = _flag(normalizer, 3, True), _flag(normalizer, 4, True)
    try:
        tokenizer = spm_tokenizer(vocabulary, prefix, strip)
    except ConvertError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ConvertError(f"{where} can't be rebuilt: {error}.") from None
    compare(tokenizer, data, where, vocabulary)
    return tokenizer_files(tokenizer, vocabulary)


def compare(tokenizer: object, data: bytes, where: str, vocabulary: Vocabulary) -> None:
    """Compare a tokenizer with sentencepiece on texts of many kinds.

    Raises:
        ConvertError: They disagree on one.
    """
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor()
    try:
        reference.LoadFromSerializedProto(data)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConvertError(f"{where} is broken: {error}.") from None
    # Words of the vocabulary itself too: they reach merges that fixed texts may not.
    normal = [
        piece.replace("▁", " ")
        for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True)
        if kind == PieceType.NORMAL
    ]
    step = max(1, len(normal) // 2000)
    own = ["".join(normal[i : i + 40 * step : step]) for i in range(0, len(normal), 40 * step)]
    for text in (*TEXTS, *own):
        expected = reference.Encode(text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
        if ids != expected:
            raise ConvertError(
                f"{where}: the tokenizer built from it splits {text[:40]!r} differently from "
                "sentencepiece; give a directory with a tokenizer.json with --tokenizer-from."
            )
