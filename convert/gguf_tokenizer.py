"""The tokenizer in a GGUF file's metadata, as Hugging Face's files."""

from __future__ import annotations

from typing import Any

from .errors import ConvertError
from .files import dump_json
from .splitting import RULES
from .tokenizer_build import PieceType, Vocabulary, bpe_tokenizer, spm_tokenizer, tokenizer_files

# What llama.cpp takes for the ids of a sentencepiece-like vocabulary that does not name them.
SPM_IDS = {"bos": 1, "eos": 2}
# Control tokens at which llama.cpp stops whatever the metadata says, by their text.
ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)


def read_gguf_tokenizer(
    metadata: dict[str, Any], vocab: int, where: str
) -> tuple[dict[str, bytes], str]:
    """Tokenizer files from the metadata, or the reason why there are none.

    A reason is not an error yet: ``--tokenizer-from`` may replace the tokenizer. With files there
    may be a remark instead.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    model, pieces = get("model"), get("tokens")
    if not isinstance(model, str) or not _strings(pieces):
        return {}, "the file holds no tokenizer"
    if len(pieces) != vocab:
        return {}, f"its tokenizer has {len(pieces)} tokens but the embedding {vocab}"
    # llama.cpp names empty pieces so; some files are padded with them.
    pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(pieces)]
    types, scores = get("token_type", [1] * len(pieces)), get("scores", [])
    if not _numbers(types) or not _numbers(scores):
        return {}, "its tokenizer's scores or types are broken"
    template = metadata.get("tokenizer.chat_template")
    ids = special_ids(metadata, len(pieces))
    note, rule = "", None
    try:
        if model == "gpt2":
            rule, note = _rule(get("pre"), pieces)
        add_bos = get("add_bos_token", rule.add_bos if rule else True)
        vocabulary = Vocabulary(
            pieces, list(map(float, scores)), types, ids["bos"], ids["eos"], bool(add_bos)
        )
        vocabulary.check(where)
        if rule is not None:
            merges = get("merges")
            if not _strings(merges):
                return {}, "its tokenizer has no merges"
            tokenizer = bpe_tokenizer(vocabulary, merges, rule)
        elif model == "llama":
            if not scores:
                return {}, "its tokenizer has no scores"
            tokenizer = spm_tokenizer(vocabulary, bool(get("add_space_prefix", True)))
        else:
            return {}, f"its tokenizer is of the kind {model[:40]!r}"
    except Exception as error:  # ConvertErrors, and the bare Exceptions of tokenizers
        return {}, str(error)
    files = tokenizer_files(tokenizer, vocabulary, template if isinstance(template, str) else None)
    return files | generation_files(metadata, vocab), note


def generation_files(metadata: dict[str, Any], vocab: int) -> dict[str, bytes]:
    """generation_config.json with the ids that end a generation.

    Args:
        metadata: Of the file.
        vocab: Rows of the embedding; ids beyond it are left out.
    """
    pieces, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    known = _strings(pieces) and _numbers(types)
    ends = end_ids(special_ids(metadata, vocab), pieces if known else [], types if known else [])
    ends = [i for i in ends if i < vocab]
    if not ends:
        return {}
    values = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    return {"generation_config.json": dump_json(values)}


def special_ids(metadata: dict[str, Any], count: int) -> dict[str, int | None]:
    """The ids of ``bos``, ``eos``, ``eot`` and ``eom``; ones outside the vocabulary are none.

    Args:
        metadata: Of the file.
        count: Tokens in the vocabulary.
    """
    found: dict[str, int | None] = {}
    for name in ("bos", "eos", "eot", "eom"):
        default = SPM_IDS.get(name) if metadata.get("tokenizer.ggml.model") == "llama" else None
        value = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
        found[name] = value if good else None
    return found


def end_ids(ids: dict[str, int | None], pieces: Any, types: Any) -> list[int]:
    """The ids at which llama.cpp stops: end of text, of a turn, of a message."""
    named = [ids[name] for name in ("eos", "eot", "eom")]
    by_text = [
        i
        for i, (piece, kind) in enumerate(zip(pieces, types, strict=False))
        if kind == PieceType.CONTROL and piece in ENDS
    ]
    if {"<|return|>", "<|call|>", "<|calls|>", "<|flush|>"} & {pieces[i] for i in by_text}:
        # Here <|end|> ends a message of several.
        by_text = [i for i in by_text if pieces[i] != "<|end|>"]
    return list(dict.fromkeys(i for i in [*named, *by_text] if i is not None))


def _rule(pre: Any, pieces: list[str]) -> tuple[Any, str]:
    """The splitting rule that a file names, and a remark where it is a guess.

    Raises:
        ConvertError: It is not known.
    """
    if isinstance(pre, str) and pre in RULES:
        return RULES[pre], ""
    if pre is not None:
        raise ConvertError(f"its splitting rule (tokenizer.ggml.pre) {str(pre)[:40]!r} is unknown")
    if "<|begin_of_text|>" in pieces:
        # Microsoft's BitNet and files of Llama 3's first weeks: the default would be wrong.
        raise ConvertError("it does not say how it splits words (tokenizer.ggml.pre)")
    return RULES["default"], (
        "the file names no splitting rule (tokenizer.ggml.pre); llama.cpp's default is used, "
        "which few models were trained with: better give the original's with --tokenizer-from"
    )


def _strings(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )
