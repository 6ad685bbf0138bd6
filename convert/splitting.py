"""How byte-level BPE tokenizers cut text into words, by the names that GGUF files carry.

``tokenizer.ggml.pre`` names a rule of llama.cpp's (``llama_vocab::impl::load`` in
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp): regular expressions that
are applied one after the other, whether a word that is a token is taken whatever the merges say,
and whether texts begin with BOS where the file does not say. Where llama.cpp approximates an
expression of the models' own tokenizer.json because its engine lacks a feature, the original
stands here.

llama.cpp never normalizes text; where transformers says that a model's own tokenizer composes
accents (NFC: Qwen's and Cohere's), so does the rule here.

Rules that are more than expressions (``kimi-k2``, ``afmoe``, ``superbpe``), that work on whole
UTF-8 (``gemma4``, ``sarvam-moe``, ``whitespace``) or belong to encoders are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, pre_tokenizers

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# What every rule of the GPT-4 family ends with: line breaks, then other white space.
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"


def _cased(ending: str, digits: str, spaces: str = SPACES) -> str:
    """Words that are split where lower case turns to upper case, as in GPT-4o."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{UPPER}*{LOWER}+{ending}|{start}{UPPER}+{LOWER}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{spaces}"
    )


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENGLISH}|{WORD}|\p{{N}}{{1,3}}{SIGNS}{SPACES}"
QWEN2 = rf"{ENGLISH}|{WORD}|\p{{N}}{SIGNS}{SPACES}"
QWEN35 = (
    rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{SPACES}"
)
TEKKEN = _cased("", r"\p{N}")
GPT4O = _cased(f"{ENGLISH}?", r"\p{N}{1,3}")
BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
DIGIT, DIGITS, UP_TO_3 = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
# Right to left in threes, as Cohere's newer tokenizers group digits.
THOUSANDS = r"\d{1,3}(?=(?:\d{3})*\b)"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+"
)
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with case as of DeepSeek's first tokenizer: without Georgian, and of an older Unicode.
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class Rule:
    """A splitting rule.

    Attributes:
        steps: Regular expressions; each cuts its matches out of what those before it left.
        ignore_merges: A word that is a token is taken as it is.
        add_bos: Texts begin with BOS unless the file says otherwise.
        nfc: Accents are composed first.
    """

    steps: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False

    def pre_tokenizer(self) -> Any:
        """The rule for the ``tokenizers`` library."""
        if self.steps == (GPT2,):  # its own form of the same expression, which readers know
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        parts = [pre_tokenizers.Split(Regex(step), "isolated") for step in self.steps]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*parts, last])


def _table() -> dict[str, Rule]:
    """The rules by every name that llama.cpp knows them under."""
    plain, digit = Rule((GPT2,)), Rule((DIGIT, GPT2))
    qwen2, gpt4o, smaug = Rule((QWEN2,)), Rule((GPT4O,)), Rule((LLAMA3,))
    llama3 = Rule((LLAMA3,), ignore_merges=True, add_bos=True)
    deepseek3 = Rule((UP_TO_3, KANA, DEEPSEEK3 + r"[\r\n]*" + SPACES))
    bailing = Rule((
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ))  # fmt: skip
    groups: dict[str, Rule] = {
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": llama3,
        "smaug-bpe dbrx glm4 chatglm-bpe": smaug,
        "qwen2": replace(qwen2, nfc=True),
        "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": qwen2,
        "qwen35": Rule((QWEN35,), nfc=True),
        "ufakzeka": Rule((rf"{WORD}|\p{{N}}{SIGNS}{SPACES}",)),
        "laguna": Rule((r"[^\n]+|[\n]+", QWEN2)),
        "tekken": Rule((TEKKEN,), ignore_merges=True, add_bos=True),
        "gpt-4o llama4 kanana2 talkie minimax-m2": gpt4o,
        "tiny_aya cohere2moe": Rule((THOUSANDS, GPT4O)),
        "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion "
        "granite-docling": plain,
        "command-r": replace(digit, nfc=True),
        "smollm starcoder refact codeshell exaone minerva-7b mellum2": digit,
        "falcon": Rule((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
        "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]")),
        "deepseek-llm": Rule((
            r"[\r\n]", rf"\s?[{DEEPSEEK_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$", CJK, DIGIT,
        )),
        "deepseek-coder": Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT)),
        "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": deepseek3,
        "spark2_5": Rule((UP_TO_3, KANA, DEEPSEEK3 + r"|[\r\n]|\s+(?!\S)|\s+", DIGIT)),
        "youtu": Rule((
            "[\uac00-\ud7a3\u3131-\u318e]+|[！…“”‘’—：；，、-〿︰-﹏]+|[\u3105-\u312f]+|" + KANA,
            _cased(f"{ENGLISH}?", DIGIT),
        ), ignore_merges=True),
        "jais-2": Rule((
            rf"{ENGLISH}|{WORD}|\p{{N}}{{1,3}}{SIGNS}|\s*[\r\n]+|"
            + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"|\s{1,2}(?!\S)|\s{1}",
        )),
        "minicpm5": Rule((UP_TO_3, rf"{ENGLISH}|{WORD}|\p{{N}}+{SIGNS}{SPACES}"),
                         ignore_merges=True),
        "seed-coder": Rule((
            rf"{ENGLISH}|{WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{SPACES}",
        )),
        "exaone-moe": Rule((
            rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )),
        "bailingmoe bailingmoe2 llada-moe": bailing,
        "poro-chat bloom gpt3-finnish": Rule((BLOOM,)),
        "viking": Rule((BLOOM, DIGIT)),
        "chameleon": Rule((
            "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT,
            r"[\p{P}!-/:-@\[-`{-~]", GPT2,
        ), add_bos=True),
    }  # fmt: skip
    return {name: rule for names, rule in groups.items() for name in names.split()}


RULES = _table()
