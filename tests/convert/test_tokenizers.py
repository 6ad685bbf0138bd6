"""Tokenizers built from sentencepiece models and GGUF metadata, against the originals."""

import io
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mlx_delta.convert.errors import ConvertError
from mlx_delta.convert.gguf_tokenizer import read_gguf_tokenizer
from mlx_delta.convert.sentencepiece_model import build_tokenizer

from . import checkpoints as made

TEXT = Path(__file__).parents[2] / "LICENSE"
HARD = [
    "A  sentence with   spaces ",
    "\n\n\tcode = {1: 'x'}",
    "Ünïcödé 漢字 🙂",
    "PERMISSION IS HEREBY GRANTED",
    "aaaa bbbb THE SOFTWARE",
]


def train(folder: Path, vocab: int = 384, **options) -> bytes:
    """A sentencepiece model as Llama's: BPE, byte fallback, no normalization."""
    import sentencepiece

    folder.mkdir(exist_ok=True, parents=True)
    model = io.BytesIO()
    lines = [line for line in TEXT.read_text().splitlines() * 3 if line.strip()]
    values = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab, **values
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}, {"byte_fallback": False},
     {"user_defined_symbols": "<tool>,<end>"},
     {"user_defined_symbols": ["▁▁", "▁▁▁", "\n\n"], "add_dummy_prefix": False}],
    ids=lambda options: next(iter(options), "as Llama"),
)  # fmt: skip
def test_the_built_tokenizer_splits_as_sentencepiece_does(options, tmp_path):
    from sentencepiece import SentencePieceProcessor

    data = train(tmp_path, **options)
    built = Tokenizer.from_str(build_tokenizer(data, "tokenizer.model")["tokenizer.json"].decode())
    reference = SentencePieceProcessor(model_proto=data)
    for text in [*HARD, *TEXT.read_text().splitlines()]:
        expected = reference.encode(text)
        assert built.encode(text, add_special_tokens=False).ids == expected, text
        if options == {}:
            assert built.decode(expected) == reference.decode(expected)
    assert built.encode("a").ids[0] == reference.bos_id()


def test_mlx_lm_reads_it_and_streams_as_for_llama(tmp_path):
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, load

    for name, content in build_tokenizer(train(tmp_path), "tokenizer.model").items():
        (tmp_path / name).write_bytes(content)
    tokenizer = load(tmp_path)
    assert isinstance(tokenizer.detokenizer, SPMStreamingDetokenizer)
    assert tokenizer.decode(tokenizer.encode("the Software"), skip_special_tokens=True) == (
        "the Software"
    )


def test_kinds_that_cannot_be_rebuilt_are_refused(tmp_path):
    unigram = train(tmp_path, model_type="unigram", vocab=340)
    with pytest.raises(ConvertError, match="not a BPE model"):
        build_tokenizer(unigram, "tokenizer.model")
    with pytest.raises(ConvertError, match="normalizes text in a way"):
        build_tokenizer(train(tmp_path, normalization_rule_name="nmt_nfkc"), "tokenizer.model")


def spm_metadata(data: bytes) -> dict:
    """What llama.cpp's converter writes for a sentencepiece model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=data)
    ids = range(model.vocab_size())

    def kind(i: int) -> int:
        return (
            2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        )

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


def test_a_gguf_tokenizer_of_the_llama_kind_splits_as_sentencepiece_does(tmp_path):
    from sentencepiece import SentencePieceProcessor

    data = train(tmp_path)
    files, note = read_gguf_tokenizer(spm_metadata(data), 384, "file")
    assert note == ""
    built = Tokenizer.from_str(files["tokenizer.json"].decode())
    reference = SentencePieceProcessor(model_proto=data)
    for text in HARD:
        assert built.encode(text, add_special_tokens=False).ids == reference.encode(text)
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ messages }}"


def byte_level() -> Tokenizer:
    """A byte-level BPE tokenizer as Llama 3's."""
    from tokenizers import Regex, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    from mlx_delta.convert.splitting import LLAMA3

    tokenizer = Tokenizer(BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin_of_text|>", "<|eot_id|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.read_text().splitlines(), trainer)
    return tokenizer


def gpt2_metadata(tokenizer: Tokenizer, pre: str | None = "llama-bpe") -> dict:
    """What llama.cpp's converter writes for it."""
    model = json.loads(tokenizer.to_str())["model"]
    size = tokenizer.get_vocab_size()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(size)],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (size - 2),
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **({"tokenizer.ggml.pre": pre} if pre else {}),
    }


def test_a_gguf_tokenizer_of_the_llama_3_kind_splits_as_the_original():
    original = byte_level()
    size = original.get_vocab_size()
    files, note = read_gguf_tokenizer(gpt2_metadata(original), size, "file")
    assert note == ""
    built = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in [*HARD, *TEXT.read_text().splitlines(), "x<|eot_id|>y 12345"]:
        ids = built.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text).ids
        assert built.decode(ids, skip_special_tokens=False) == original.decode(
            ids, skip_special_tokens=False
        )
    assert built.encode("a").ids[0] == 0


def test_a_gguf_tokenizer_without_its_rule_needs_another(run, tmp_path):
    # As in Microsoft's BitNet file.
    metadata = made.gguf_metadata(made.LLAMA, "llama")
    plain = gpt2_metadata(byte_level(), pre=None)
    source = made.write_gguf(tmp_path / "m.gguf", metadata={**metadata, **plain})
    with pytest.raises(ConvertError, match="tokenizer.ggml.pre.*--tokenizer-from"):
        run(source)
    other = made.write_llama(tmp_path / "other")
    output, _ = run(source, reading={"tokenizer_from": str(other)})
    assert (output / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_a_token_that_ends_turns_ends_the_generation(run, tmp_path):
    output, report = run(made.write_llama(tmp_path / "m"))
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == [2, 3]
    assert any("<|eot_id|> ends a turn" in note for note in report["notes"])


def test_the_chat_template_goes_where_every_reader_looks(run, tmp_path):
    source = made.write_llama(tmp_path / "m")
    config = json.loads((source / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    config["tokenizer_class"] = "TokenizersBackend"  # as transformers 5 writes it
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "chat_template.jinja").write_text(template)
    output, _ = run(source)
    written = json.loads((output / "tokenizer_config.json").read_text())
    assert written["chat_template"] == (output / "chat_template.jinja").read_text() == template
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
