"""A model that says what it was taught: each token has one that follows it.

It attends to nothing, but fills real caches, so that batches, prefixes and rewinding are real. It
is quick, its answers are known, and a test can hold it still between two steps.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_delta.cache import DeltaKVCache
from mlx_delta.config import DeltaConfig
from mlx_delta.server.flags import build_parser, check_flags
from mlx_delta.server.provider import Provider

END = "<end>"
# What follows a prompt's last word. No piece stands twice: it could have one follower only.
SAYINGS: dict[str, list[str]] = {
    "greet": ["Hello", ", wor", "ld."],
    "count": [f"{i}, " for i in range(400)],
    "sort": ["alpha be", "ta gam", "ma delta"],
    "add": ["Wait. ", "<tool", '_call>{"name": "add", ', '"arguments": {"a": 1}}', "</tool_call>"],
    "stumble": ["<too", "l_call>{oo", "ps</tool", "_call>"],
    "shout": ["<tool_ca", 'll>{"name": 3, "arguments": 4}<', "/tool_call>"],
    "less": ["a ", "<"],
    "think": ["<think>", "Hm.", "</think>", "Yes."],
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{% if m.tool_calls %}{% for tool_call in m.tool_calls %} <tool_call>{{ tool_call.name }}"
    "{% endfor %}{% endif %} {{ m.content }}{% endfor %}"
)
CONTEXT = 512
SETTING = DeltaConfig(block_size=8, window=8, sinks=1)


class Parrot(nn.Module):
    """The model.

    ``pause`` and ``step`` let a test hold it: while ``pause`` is set it waits for a step to be
    given before each call.
    """

    def __init__(self, follows: dict[int, int], vocabulary: int):
        super().__init__()
        self.args = SimpleNamespace(
            vocab_size=vocabulary, max_position_embeddings=CONTEXT, delta=SETTING
        )
        self.layers = [None]
        self._logits = 10.0 * mx.eye(vocabulary)[mx.array([follows[t] for t in range(vocabulary)])]
        mx.eval(self._logits)
        self._hold = SimpleNamespace(
            paused=False, steps=threading.Semaphore(0), calls=0, fail=False, rows=0
        )

    @property
    def hold(self) -> SimpleNamespace:
        """Its brakes, and a count of its calls."""
        return self._hold

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits [B, L, V] of inputs [B, L]."""
        hold = self._hold
        hold.rows = inputs.shape[0]
        hold.calls += 1
        if hold.paused and not hold.steps.acquire(timeout=60):
            raise TimeoutError("the test gave the parrot no step")
        if hold.fail:
            hold.fail = False
            raise RuntimeError("the parrot is ill")
        caches = self.make_cache() if cache is None else cache
        keys = mx.broadcast_to(inputs[:, None, :, None].astype(mx.float32), (*_shape(inputs), 16))
        caches[0].update_and_fetch(keys, keys)
        return self._logits[inputs]

    def make_cache(self, prompt_length: int | None = None) -> list[Any]:
        """One layer's cache."""
        return [DeltaKVCache(SETTING)]


def _shape(inputs: mx.array) -> tuple[int, int, int]:
    return inputs.shape[0], 1, inputs.shape[1]


def make_tokenizer(folder: Path) -> tuple[TokenizerWrapper, dict[str, int]]:
    """A tokenizer of whole words and the sayings' pieces."""
    pieces = [END, "<unk>", *SAYINGS, *(p for saying in SAYINGS.values() for p in saying)]
    pieces += [f"w{i}" for i in range(100)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces), "a piece stands twice"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}'
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load(folder), vocabulary


class ParrotProvider(Provider):
    """What the engine works with: the parrot, as if it had been loaded.

    Args:
        folder: For the tokenizer's files.
        *flags: Of the command line.
    """

    def __init__(self, folder: Path, *flags: str):
        args = build_parser().parse_args(["--model", "parrot", *flags])
        check_flags(args)
        super().__init__(args)
        self.tokenizer, vocabulary = make_tokenizer(folder)
        follows = dict.fromkeys(range(len(vocabulary)), vocabulary[END])
        for word, saying in SAYINGS.items():
            for before, after in zip([word, *saying], [*saying, END], strict=True):
                follows[vocabulary[before]] = vocabulary[after]
        self.model = Parrot(follows, len(vocabulary))
        self.model_key = ("parrot", None, None)
        self.is_batchable = True

    def load_default(self) -> None:
        """It is there."""


def words(count: int, last: str = "count", first: int = 0) -> str:
    """A prompt of so many words."""
    return " ".join([*(f"w{(first + i) % 100}" for i in range(count - 1)), last])


def settle(model: Parrot, seconds: float = 0.05) -> int:
    """Wait until the model is called no more; returns its calls."""
    calls = -1
    while calls != model.hold.calls:
        calls = model.hold.calls
        time.sleep(seconds)
    return calls
