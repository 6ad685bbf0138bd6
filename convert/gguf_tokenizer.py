"""The tokenizer in a GGUF file's metadata, as Hugging Face's files."""

from __future__ import annotations

from typing import Any

from .errors import ConvertError
from .files import dump_json
from .tokenizer_build import Vocabulary, bpe_tokenizer, spm_tokenizer, tokenizer_files


def read_gguf_tokenizer(
    metadata: dict[str, Any], vocab: int, where: str
) -> tuple[dict[str, bytes], str]:
    """Tokenizer files from the metadata, or the reason why there are none.

    A reason is not an error yet: ``--tokenizer-from`` may replace the tokenizer.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    model, pieces = get("model"), get("tokens")
    if not isinstance(model, str) or not _strings(pieces):
        return {}, "the file holds no tokenizer"
    if len(pieces) != vocab:
        return {}, f"its tokenizer has {len(pieces)} tokens but the embedding {vocab}"
    types, scores = get("token_type", [1] * len(pieces)), get("scores", [])
    if not _numbers(types) or not _numbers(scores):
        return {}, "its tokenizer's scores or types are broken"
    template = metadata.get("tokenizer.chat_template")
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos"):
        value = get(f"{name}_token_id")
        ids[name] = value if isinstance(value, int) and value < len(pieces) else None
    add_bos = get("add_bos_token", True)
    vocabulary = Vocabulary(
        pieces, list(map(float, scores)), types, ids["bos"], ids["eos"], bool(add_bos)
    )
    try:
        vocabulary.check(where)
        if model == "gpt2":
            pre, merges = get("pre"), get("merges")
            if not isinstance(pre, str):
                # Microsoft's BitNet files; its chat template is wrong, too.
                return {}, "its tokenizer does not say how it splits words (tokenizer.ggml.pre)"
            if not _strings(merges):
                return {}, "its tokenizer has no merges"
            tokenizer = bpe_tokenizer(vocabulary, merges, pre)
        elif model == "llama":
            if not scores:
                return {}, "its tokenizer has no scores"
            tokenizer = spm_tokenizer(vocabulary, bool(get("add_space_prefix", True)))
        else:
            return {}, f"its tokenizer is of the kind {model[:40]!r}"
    except ConvertError as error:
        return {}, f"its tokenizer can't be rebuilt: {error}"
    except Exception as error:  # tokenizers raises bare Exceptions
        return {}, f"its tokenizer can't be rebuilt: {error}"
    files = tokenizer_files(tokenizer, vocabulary, template if isinstance(template, str) else None)
    if vocabulary.eos is not None:
        files["generation_config.json"] = dump_json({"eos_token_id": vocabulary.eos})
    return files, ""


def _strings(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )
