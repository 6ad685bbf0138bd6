"""The demo model's tokenizer: byte-level BPE trained on the text itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, whole_words: Iterable[str] = ()
) -> Tokenizer:
    """Train a tokenizer that adds nothing of its own: `decode(encode(text)) == text`.

    Each of `whole_words` becomes one token (with the space before it), however rare it is.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    often = 5000 * "".join(f" {word}" for word in whole_words)
    tokenizer.train_from_iterator(chain(texts, [often]), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int = 2048) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (no chat template: prompts go in raw)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
