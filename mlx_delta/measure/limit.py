"""Staying within the memory there is: a plan before loading, and a watch while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.cache.written_out import MOST_BYTES
from mlx_delta.checkpoint.weights import read_headers
from mlx_delta.config import DeltaConfig
from mlx_delta.models.anatomy import context_length, trace_heads
from mlx_delta.models.common import model_setting
from mlx_delta.ops.backend import has_kernels
from mlx_delta.system.devices import has_gpu
from mlx_delta.system.kv import SMALLER, kv_fields
from mlx_delta.system.memory import free_memory, show_bytes

# Share of the changes that propagate, of held keys: about what the default setting leaves.
_CHANGED = 0.4
_SHOWN_TOKENS = 8192  # of a model whose context is not known
_CHECK_EVERY = 16  # tokens of an answer
_LEAST_FREE = 16 << 20  # that an answer's next tokens may take


@dataclass(frozen=True)
class Plan:
    """About what a model and a text take, from what its files say.

    Attributes:
        weights: Bytes of the weights, as they are when loaded.
        layers: Layers with caches.
        kv_heads: Their heads.
        head_dim: Elements of a key.
        width: Numbers of one token that are in memory while a layer is computed.
        step: Tokens of a prompt at a time.
    """

    weights: int
    layers: int
    kv_heads: int
    head_dim: int
    width: int
    step: int

    @classmethod
    def of(cls, path: Path, config: Mapping[str, Any], step: int) -> Plan | None:
        """The plan of a model's directory; ``None`` for one whose configuration says too little."""
        config = config.get("text_config") or config
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
        numbers = [config.get(name) for name in names]
        if not all(isinstance(x, int) and x > 0 for x in numbers):
            return None
        layers, hidden, heads = (int(x or 0) for x in numbers)
        weights = 0
        for tensor in read_headers(path).values():
            wide = not has_gpu() and tensor.dtype in ("F16", "BF16")
            weights += tensor.nbytes * (2 if wide else 1)
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        width = 6 * hidden + 3 * int(config.get("intermediate_size") or 4 * hidden)
        return cls(weights, layers, kv_heads, head_dim, width, step)

    @classmethod
    def of_model(cls, model: nn.Module) -> Plan | None:
        """The plan of a loaded model's caches; ``None`` where layers keep other things too."""
        heads = trace_heads(model)
        first = heads[0] if heads else None
        same = first is not None and all(layer == first for layer in heads)
        if first is None or not same or first.key_dim != first.value_dim:
            return None
        return cls(0, len(heads), first.kv_heads, first.key_dim, 0, 1)

    @property
    def _item(self) -> int:
        return 2 if has_gpu() else 4

    def caches(self, setting: DeltaConfig | None, tokens: int) -> int:
        """Bytes of the caches of a text."""
        key = value = 8.0 * self._item
        near = 0
        if setting is not None and setting.max_size is not None:
            tokens = min(tokens, setting.max_size)
        if setting is not None and setting.key_bits is not None:
            key = setting.key_bits + 0.5
            if setting.key_format == "deltas":
                key = 1.4 + _CHANGED * setting.key_bits
            near = 2 * self.head_dim * (setting.window + 2 * setting.block_size)
            near *= 2 if setting.value_format == "rotated" else 1
        if setting is not None and setting.value_bits is not None:
            value = setting.value_bits + (0.125 if setting.value_bits < 16 else 0)
        token = self.head_dim * (key + value) / 8
        return int(self.layers * self.kv_heads * (tokens * token + near))

    def needed(self, setting: DeltaConfig | None, tokens: int) -> int:
        """Bytes at most: weights, caches, and one layer's keys and values while it is computed."""
        step = min(self.step, tokens)
        kept = tokens
        if setting is not None and setting.max_size is not None:
            kept = min(tokens, setting.max_size + step)
        layer = 4 * self.kv_heads * self.head_dim * kept * self._item
        return self.weights + self.caches(setting, tokens) + layer + self.width * step * self._item

    def most_tokens(self, setting: DeltaConfig | None, free: int) -> int:
        """The longest text that fits; 0 if none does."""
        low, high = 0, 1 << 24
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.needed(setting, middle) <= free else (low, middle - 1)
            )
        return low


def said_of_caches(model: nn.Module) -> str:
    """What the caches of a text take, of a model whose setting stores them small; else nothing.

    Returns:
        Words to go on with, such as ``; 8192 tokens take 47 MB (dense: 377 MB)``.
    """
    setting, tokens = model_setting(model), context_length(model) or _SHOWN_TOKENS
    if setting is None or setting.key_bits is None:
        return ""
    plan = Plan.of_model(model)
    if plan is None:
        return ""
    own, dense = (plan.caches(x, tokens) for x in (setting, None))
    if setting.max_size is not None:
        tokens = min(tokens, setting.max_size)
    said = f"; {tokens} tokens take about {show_bytes(own)} (dense: {show_bytes(dense)})"
    if not has_kernels():
        most = min(plan.layers * MOST_BYTES, dense)
        said += f", and up to {show_bytes(most)} written out while decoding, without a GPU"
    return said


def check_plan(name: str, plan: Plan | None, setting: DeltaConfig | None, tokens: int) -> None:
    """Refuse a model and a text that will not fit, before anything is loaded, and say what would.

    Args:
        name: Of the model, for the message.
        plan: Its plan.
        setting: Of the delta.
        tokens: Of prompt and answer.

    Raises:
        MemoryError: They will not fit.
    """
    free, limit = free_memory()
    if plan is None or plan.needed(setting, tokens) <= free:
        return
    begin = (
        f"{name} with {tokens} tokens of prompt and answer takes about "
        f"{show_bytes(plan.needed(setting, tokens))} ({show_bytes(plan.weights)} of it weights) "
        f"but {limit} leaves {show_bytes(max(0, free))}"
    )
    raise MemoryError(f"{begin}; {_what_would(plan, setting, tokens, free)}.")


def _what_would(plan: Plan, setting: DeltaConfig | None, tokens: int, free: int) -> str:
    """What to ask for instead."""
    found = []
    now = plan.needed(setting, tokens)
    for name in SMALLER:
        try:
            smaller = (setting or DeltaConfig()).changed(**kv_fields(name))
        except ValueError:  # a chain can't be coded
            continue
        if plan.needed(smaller, tokens) <= min(free, now - 1):
            begin = f"--kv {name}" if setting is not None else f"--kv {name} without --no-delta"
            found.append(f"{begin} takes {show_bytes(plan.needed(smaller, tokens))}")
    most = plan.most_tokens(setting, free)
    if most:
        found.append(f"{most} tokens fit as it is")
    if not found:
        return "use a smaller or more strongly quantized model"
    return "what would fit: " + "; or ".join(found)


class MemoryWatch:
    """Ends a generation before memory does."""

    def __init__(self) -> None:
        self._before = 0
        mx.reset_peak_memory()

    def progress(self, done: int, whole: int) -> None:
        """mlx-lm's callback, after each chunk of the prompt.

        Raises:
            MemoryError: The next one would take more than there is.
        """
        active, peak = mx.get_active_memory(), mx.get_peak_memory()
        chunk, self._before = done - self._before, done
        if not 0 < done < whole - 1 or chunk <= 0:
            return
        # As much as this chunk took besides what stays, and in proportion to the longer text.
        needed = int(max(0, peak - active) * (1 + min(chunk, whole - done) / done))
        free, limit = free_memory(0)
        if needed > free:
            raise MemoryError(
                f"stopped after {done} of {whole} tokens of the prompt: the next ones take about "
                f"{show_bytes(needed)} but {limit} leaves {show_bytes(max(0, free))}; use a "
                "smaller --prefill-step-size, --kv small, --max-kv-size or a shorter prompt."
            )

    def token(self, count: int) -> None:
        """After a token of the answer.

        Raises:
            MemoryError: There is no room for more.
        """
        if count % _CHECK_EVERY:
            return
        free, limit = free_memory(0)
        if free < _LEAST_FREE:
            raise MemoryError(
                f"stopped after {count} tokens of the answer: {limit} leaves "
                f"{show_bytes(max(0, free))}."
            )
