"""A model directory's tokenizer: read by mlx-lm, with checks before and after."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from .json_file import one_line, read_json, shown

_NAME = re.compile(r"\w{1,64}")
# The files of which one must be there.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")


def read_tokenizer(
    path: Path, options: Mapping[str, Any], eos_token_ids: Any, trust_remote_code: bool
) -> TokenizerWrapper:
    """A directory's tokenizer.

    Args:
        path: The directory.
        options: The caller's, for transformers' ``from_pretrained``; never a file's.
        eos_token_ids: From config.json.
        trust_remote_code: Whether it may run code of its own.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It can't be read.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        if (path / name).exists():
            values = read_json(path / name)
            for entry in ("chat_template_type", "tool_parser_type"):
                # mlx-lm imports a module of its own by these names.
                value = values.get(entry)
                is_name = isinstance(value, str) and _NAME.fullmatch(value)
                if name == "tokenizer_config.json" and value is not None and not is_name:
                    raise ValueError(
                        f"[load] {entry} must be a name in {name} but got {shown(value)}."
                    )
    has_code = trust_remote_code or any(path.glob("*.tiktoken")) or any(path.glob("tokenizer*.py"))
    if not has_code and not any((path / name).exists() for name in _FILES):
        raise FileNotFoundError(f"[load] {path} has no tokenizer ({', '.join(_FILES[:2])}).")
    if options.get("trust_remote_code", trust_remote_code) != trust_remote_code:
        raise ValueError(
            "[load] tokenizer_config must not hold trust_remote_code; pass it to load itself."
        )
    options = {**options, "trust_remote_code": trust_remote_code}
    try:
        return load_tokenizer(path, options, eos_token_ids=eos_token_ids)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # transformers and tokenizers raise whatever they meet
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"[load] the tokenizer in {path} is code of its own, which runs only with "
                "trust_remote_code=True (--trust-remote-code)."
            ) from error
        raise ValueError(
            f"[load] the tokenizer in {path} can't be read: {one_line(error)}"
        ) from error


def check_vocabulary(tokenizer: TokenizerWrapper, path: Path, rows: int) -> None:
    """Refuse a tokenizer whose pieces have no row in the embedding: MLX reads past its end.

    Added tokens may lie beyond: Gemma 3's smallest models have one for images, which no text
    means. A prompt that holds one is refused by its id.

    Args:
        tokenizer: The tokenizer.
        path: Where it is from, for the message.
        rows: Of the embedding.

    Raises:
        ValueError: A piece, or the mark of a text's begin or end, has no row.
    """
    added = (
        set(tokenizer.added_tokens_decoder) if hasattr(tokenizer, "added_tokens_decoder") else set()
    )
    most = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1)
    ids = [getattr(tokenizer, "bos_token_id", None), *(tokenizer.eos_token_ids or ())]
    marks = max((i for i in ids if isinstance(i, int)), default=-1)
    if most >= rows or marks >= rows:
        what = f"pieces up to {most}" if most >= rows else f"begin or end {marks}"
        raise ValueError(
            f"[load] the tokenizer in {path} has {what} but the model's embedding has {rows} rows: "
            "they do not belong together."
        )
