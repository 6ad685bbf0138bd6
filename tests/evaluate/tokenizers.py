"""Tokenizers of other kinds than the demo model's, small, and made here."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlx_delta.evaluate import BUNDLED_TEXT, read_text
from mlx_delta.loading import find_model


def demo() -> TokenizerWrapper:
    """The bundled model's: byte-level, no BOS, most words one token."""
    return load_tokenizer(find_model("demo"))


def byte_pairs() -> TokenizerWrapper:
    """Byte-level with 350 tokens, so that words take several; and with a BOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, 350, pre_tokenizers.ByteLevel.alphabet())


def metaspace() -> TokenizerWrapper:
    """Like sentencepiece's: puts a space before any text; and with a BOS token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _train(tokenizer, 700, [])


def _train(tokenizer: Tokenizer, size: int, alphabet: list[str]) -> TokenizerWrapper:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([read_text(BUNDLED_TEXT)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return TokenizerWrapper(wrapped)


ALL = {"demo": demo, "byte_pairs": byte_pairs, "metaspace": metaspace}
