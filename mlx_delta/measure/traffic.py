"""What decoding one token reads and multiplies: computed from a model and its caches, not timed.

Decoding is bound by memory: each token reads every weight and the whole cache once. Bytes are
those that attention and products must load, without room to grow. Where there is no GPU, models
run in float32; floats are then counted at the 16 bits that they take on a Mac.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache

from mlx_delta.cache import HeldKeys
from mlx_delta.cache.check_state import leaves
from mlx_delta.cache.window_only import WindowOnlyCache
from mlx_delta.models.anatomy import query_heads
from mlx_delta.system.devices import has_gpu
from mlx_delta.ternary.linear import TernaryLinear


@dataclass(frozen=True)
class Traffic:
    """What decoding one token takes, with as many tokens in the cache as there are now.

    Attributes:
        weight_bytes: Of weights read.
        cache_bytes: Of keys and values read, and of what they are stored with.
        projection_macs: Multiply-accumulates of linear layers and the head.
        attention_macs: Those of QK^T and of its product with V, for every key that is seen.
        skippable_macs: Those of QK^T with a delta that is zero. The kernels do not skip them yet.
    """

    weight_bytes: int
    cache_bytes: int
    projection_macs: int
    attention_macs: int
    skippable_macs: int

    @property
    def bytes(self) -> int:
        """All bytes read."""
        return self.weight_bytes + self.cache_bytes

    @property
    def macs(self) -> int:
        """Multiply-accumulates that are needed: without the skippable ones."""
        return self.projection_macs + self.attention_macs - self.skippable_macs

    def to_dict(self) -> dict[str, int]:
        """The figures as plain JSON values."""
        return {**asdict(self), "bytes": self.bytes, "macs": self.macs}


def decode_traffic(model: nn.Module, caches: Sequence[Any]) -> Traffic:
    """What the last token cost, or would cost to decode: its own key and value are in the caches.

    Args:
        model: From :func:`mlx_delta.load`.
        caches: The model's, each with a single text.
    """
    single, heads = leaves(caches), query_heads(model)
    pairs = [(_seen(cache), n) for cache, n in zip(single, heads, strict=True) if n is not None]
    states = sum(cache.nbytes for cache, n in zip(single, heads, strict=True) if n is None)
    return Traffic(
        weight_bytes=weight_bytes(model),
        cache_bytes=sum(layer.bytes for layer, _ in pairs) + states,
        projection_macs=projection_macs(model),
        attention_macs=sum(
            layer.tokens * n * (layer.key_dim + layer.value_dim) for layer, n in pairs
        ),
        skippable_macs=sum(layer.zeros * n // layer.kv_heads for layer, n in pairs),
    )


# Weights.


def weight_bytes(model: nn.Module, ternary_kernel: bool = True) -> int:
    """Bytes of weights that decoding one token reads; no weight is read to count them.

    Every parameter once, quantized ones as they are stored. Of an embedding that is not the head
    as well, only one row.

    Args:
        model: A Llama or BitNet, of any layers.
        ternary_kernel: Whether ternary layers go through the kernel ``ternary_matvec``, which
            reads one scale of a layer that has one, or through MLX's quantized product.
    """
    count = _parameter_bytes(model)
    module: Any
    for module in model.modules():
        if isinstance(module, TernaryLinear) and ternary_kernel and module.one_scale:
            scales = _nbytes(module.scales) + _nbytes(module.biases)
            count -= scales - _item_bytes(module.scales)
        elif _is_embedding(module) and not _is_tied(model):
            size = _parameter_bytes(module)
            count -= size - size // module.weight.shape[0]
    return count


def projection_macs(model: nn.Module) -> int:
    """Multiply-accumulates of linear layers and the head, for one token: inputs x outputs."""
    count = 0
    module: Any
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) or (
            _is_embedding(module) and _is_tied(model)
        ):
            outputs, inputs = module.weight.shape
            bits = module.bits if "scales" in module else 32  # a quantized row is 32-bit words
            count += outputs * inputs * 32 // bits
    return count


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def _is_tied(model: nn.Module) -> bool:
    """Whether the embedding serves as the head."""
    return "lm_head" not in model


def _parameter_bytes(module: nn.Module) -> int:
    parameters: Any = tree_flatten(module.parameters())
    return sum(_nbytes(weight) for _, weight in parameters)


def _nbytes(array: mx.array) -> int:
    return array.size * _item_bytes(array)


def _item_bytes(array: mx.array) -> int:
    """Bytes of an array's number on a Mac."""
    if mx.issubdtype(array.dtype, mx.floating) and not has_gpu():
        return min(array.itemsize, 2)
    return array.itemsize


# Caches.


@dataclass(frozen=True)
class _Seen:
    """What a query reads of one layer's cache.

    Attributes:
        tokens: That it sees.
        key_dim: Elements of a key.
        value_dim: Elements of a value.
        kv_heads: Heads of keys and values.
        bytes: Of all of them.
        zeros: Zero deltas among the keys, over all kv heads.
    """

    tokens: int
    key_dim: int
    value_dim: int
    kv_heads: int
    bytes: int
    zeros: int = 0


def _seen(cache: Any) -> _Seen:
    if isinstance(cache, HeldKeys):
        return _seen_held(cache)
    tokens = cache.size() if isinstance(cache, RotatingKVCache) else cache.offset
    if hasattr(cache, "bits"):  # mlx-lm's mark of a quantized cache: words, scales and biases
        codes = 32 // cache.bits  # in a word
        key_dim, value_dim = (x[0].shape[3] * codes for x in (cache.keys, cache.values))
        arrays = [*cache.keys, *cache.values]
    else:
        key_dim, value_dim = cache.keys.shape[3], cache.values.shape[3]
        arrays = [cache.keys, cache.values]
    size = sum(_token_bytes(array) for array in arrays) * tokens
    return _Seen(tokens, key_dim, value_dim, arrays[0].shape[1], size)


def _seen_held(cache: HeldKeys) -> _Seen:
    """Of held keys: those of far blocks as they are stored, near ones and values in full."""
    far = cache.encoded[0] - cache.dropped[0]
    zeros = 0
    if not isinstance(cache, WindowOnlyCache):
        zeros = int(np.array(cache.zeros[:, :, :far], np.int64).sum())
    return _Seen(
        cache.seen_tokens,
        cache.head_dim,
        cache.value_dim,
        cache.kv_heads,
        cache.read_bytes(None if has_gpu() else 2),
        zeros,
    )


def _token_bytes(array: mx.array) -> int:
    """Bytes of one token in a buffer [B, heads, capacity, ..]."""
    return _nbytes(array) // array.shape[2]


# Operations.
