"""Splitting rules of GGUF files, against what real models' own tokenizers give."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mlx_delta.convert.gguf_tokenizer import end_ids, read_gguf_tokenizer, special_ids
from mlx_delta.convert.splitting import RULES, _table

GOLDEN = json.loads(Path(__file__).with_name("tokenizers.json").read_text(encoding="utf-8"))


def metadata(tokens: list[str], merges: list[str], pre: str | None, **more) -> dict:
    found = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [1] * len(tokens),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **({} if pre is None else {"pre": pre}),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def rebuild(values: dict) -> Tokenizer:
    count = len(values["tokenizer.ggml.tokens"])
    files, reason = read_gguf_tokenizer(values, count, "file")
    assert files, reason
    return Tokenizer.from_str(files["tokenizer.json"].decode())


@pytest.mark.parametrize("name", sorted(GOLDEN["rules"]))
def test_a_rule_gives_the_ids_of_the_models_own_tokenizer(name):
    real = GOLDEN["rules"][name]
    built = rebuild(metadata(real["tokens"], real["merges"], name))
    for text, expected in zip(GOLDEN["texts"], real["ids"], strict=True):
        assert built.encode(text, add_special_tokens=False).ids == expected, text


def test_the_wrong_rule_gives_other_ids():
    real = GOLDEN["rules"]["llama-bpe"]
    for other in ("gpt-2", "smollm", "tekken", "qwen2", "deepseek-llm", "default"):
        built = rebuild(metadata(real["tokens"], real["merges"], other))
        ids = [built.encode(text, add_special_tokens=False).ids for text in GOLDEN["texts"]]
        assert ids != real["ids"], other


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_loses_nothing_of_a_text(name):
    steps = RULES[name].pre_tokenizer()
    for text in GOLDEN["texts"]:
        cut = steps.pre_tokenize_str(text)
        spans = [span for _, span in cut]
        assert "".join(text[a:b] for a, b in spans) == text


@pytest.mark.parametrize(
    "name, words",
    [
        ("default", ["Hi", "!!", "Ġ", "123", "45", "Ġx"]),
        ("falcon", ["Hi", "!!", "Ġ", "123", "45", "Ġx"]),
        ("gpt-2", ["Hi", "!!", "Ġ12345", "Ġx"]),
        ("smollm", ["Hi", "!!", "Ġ", "1", "2", "3", "4", "5", "Ġx"]),
        ("llama-bpe", ["Hi", "!!", "Ġ", "123", "45", "Ġx"]),
        ("jais-2", ["Hi", "!!", "Ġ", "123", "45", "Ġx"]),
        ("qwen35", ["Hi", "!!", "Ġ", "1", "2", "3", "4", "5", "Ġx"]),
        ("tiny_aya", ["Hi", "!!", "Ġ", "12", "345", "Ġx"]),
        ("bloom", ["Hi", "!!", "Ġ12345", "Ġx"]),
        ("viking", ["Hi", "!!", "Ġ", "1", "2", "3", "4", "5", "Ġx"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_words_of_rules_without_a_tokenizer_to_compare_with(name, words):
    cut = RULES[name].pre_tokenizer().pre_tokenize_str("Hi!! 12345 x")
    assert [word for word, _ in cut] == words


@pytest.mark.parametrize(
    "pre, key, expected",
    [
        ("llama-bpe", None, True),
        ("falcon3", None, True),
        ("tekken", None, True),
        ("smollm", None, False),
        ("qwen2", None, False),
        ("smaug-bpe", None, False),
        ("llama-bpe", False, False),
        ("smollm", True, True),
    ],
)
def test_texts_begin_with_bos_where_the_file_or_else_the_rule_says_so(pre, key, expected):
    real = GOLDEN["rules"]["smollm"]
    more = {} if key is None else {"add_bos_token": key}
    built = rebuild(metadata(real["tokens"], real["merges"], pre, **more))
    assert (built.encode("x y").ids[0] == 0) == expected


def test_names_stand_for_one_rule_each():
    assert _table() == RULES and len(RULES) == 75
    assert RULES["llama3"] == RULES["falcon3"] == RULES["llama-bpe"] != RULES["smaug-bpe"]
    assert RULES["smaug-bpe"].steps == RULES["llama-bpe"].steps
    ignoring = {name for name, rule in RULES.items() if rule.ignore_merges}
    assert {"llama-bpe", "falcon3", "tekken", "youtu", "minicpm5"} < ignoring
    assert not ignoring & {"smaug-bpe", "gpt-4o", "llama4", "qwen2", "smollm"}


def test_a_name_that_is_not_known_is_refused():
    real = GOLDEN["rules"]["smollm"]
    files, reason = read_gguf_tokenizer(
        metadata(real["tokens"], real["merges"], "kimi-k2"), len(real["tokens"]), "file"
    )
    assert not files and "'kimi-k2' is unknown" in reason


def test_without_a_name_the_default_is_taken_with_a_remark():
    real = GOLDEN["rules"]["smollm"]
    count = len(real["tokens"])
    files, note = read_gguf_tokenizer(metadata(real["tokens"], real["merges"], None), count, "file")
    assert "--tokenizer-from" in note
    named = rebuild(metadata(real["tokens"], real["merges"], "default"))
    assert files["tokenizer.json"].decode() == named.to_str()


def test_every_end_that_llama_cpp_stops_at_ends_a_generation():
    tokens = ["<s>", "</s>", "<|turn|>", "<|message|>", "<|im_end|>", "<|end|>", "a"]
    types = [3, 3, 3, 3, 3, 1, 1]
    values = metadata(tokens, [], "gpt-2", eot_token_id=2, eom_token_id=3)
    ids = special_ids(values, len(tokens))
    # <|end|> is no control token here: a word like any other.
    assert end_ids(ids, tokens, types) == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [-1, 7, 1 << 40, True, "2", None, 2.0])
def test_ids_outside_the_vocabulary_are_none(value):
    values = metadata(["a"] * 7, [], "gpt-2", eot_token_id=value)
    assert special_ids(values, 7)["eot"] is None


def test_sentencepiece_files_that_name_no_ids_mean_llamas():
    values = {"tokenizer.ggml.model": "llama"}
    assert special_ids(values, 9) == {"bos": 1, "eos": 2, "eot": None, "eom": None}
