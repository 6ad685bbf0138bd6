"""Quantized layers that multiply in float32, for machines without a GPU.

Their parameters stay those of MLX's quantized layers, so they are saved, counted and adapted like
these. Float32 values are kept beside them where memory allows, and made anew for each product of
many rows where it does not. Layers of experts (mlx-lm's ``QuantizedSwitchLinear``) keep MLX's own
product: each of their rows meets the matrix of another expert, so that none has many rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_delta.ops.float_weights import LEAST_ROWS, Packing, dequantize, float_product


@dataclass(frozen=True)
class _Kept:
    """Float32 values, and what they were made from.

    Attributes:
        made_from: The weight, its scales and biases: other ones make the values out of date.
        values: [in, out], contiguous. Products with few rows read them 1.5 times as fast as
            [out, in], which the BLAS has to copy across.
    """

    made_from: tuple[Any, ...]
    values: mx.array


class FloatProduct(nn.Module):
    """The part of a quantized layer that multiplies; inherited before MLX's layer."""

    group_size: int
    bits: int
    mode: str
    weight: mx.array
    scales: mx.array
    _kept: _Kept | None = None

    def keep_values(self) -> None:
        """Keep float32 values of the weights, until the weights change; evaluates them."""
        if not self._has_kept():
            values = mx.contiguous(dequantize(*self._packed()).T)
            mx.eval(values)
            self._kept = _Kept(self._packed()[:3], values)

    @property
    def value_bytes(self) -> int:
        """Bytes that the float32 values take."""
        return self.weight.size * 32 // self.bits * mx.float32.size

    def _packed(self) -> tuple[mx.array, mx.array, mx.array | None, Packing]:
        packing = Packing(self.group_size, self.bits, self.mode)
        return self.weight, self.scales, self.get("biases"), packing

    def _has_kept(self) -> bool:
        kept, packed = self._kept, self._packed()[:3]
        return kept is not None and all(
            old is new for old, new in zip(kept.made_from, packed, strict=True)
        )

    def _product(self, x: mx.array) -> mx.array | None:
        """``x @ weight.T`` in float32; ``None`` where MLX's own product is the faster one."""
        if self._has_kept():
            assert self._kept is not None
            return (x.astype(mx.float32) @ self._kept.values).astype(x.dtype)
        if x.size // x.shape[-1] >= LEAST_ROWS:
            return float_product(x, *self._packed()).astype(x.dtype)
        return None


class FloatProductLinear(FloatProduct, nn.QuantizedLinear):
    """``nn.QuantizedLinear``, multiplied in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply x [.., in]; [.., out] in the type of x."""
        y = self._product(x)
        if y is None:
            return super().__call__(x)
        return y + self.bias if "bias" in self else y


class FloatProductEmbedding(FloatProduct, nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding``, multiplied in float32 where it serves as the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits [.., vocabulary] of x [.., hidden]."""
        y = self._product(x)
        return super().as_linear(x) if y is None else y


_TWINS: dict[type, type] = {
    nn.QuantizedLinear: FloatProductLinear,
    nn.QuantizedEmbedding: FloatProductEmbedding,
}


def use_float_products(model: nn.Module, room: int = 0) -> None:
    """Make a model's quantized layers multiply in float32.

    The layers' class is changed rather than the layers replaced: whoever holds one sees it.
    Layers of other classes, ternary ones for instance, have products of their own.

    Args:
        model: Any model.
        room: Bytes that kept float32 values may take; they are kept for all layers or none, so
            that a model's speed does not depend on the order of its layers.
    """
    for module in model.modules():
        twin = _TWINS.get(type(module))
        if twin is not None:
            module.__class__ = twin
    layers = list(_products(model))
    if 0 < sum(layer.value_bytes for layer in layers) <= room:
        for layer in layers:
            layer.keep_values()


def _products(model: nn.Module) -> Iterator[FloatProduct]:
    """The layers that multiply: an embedding only where it serves as the head."""
    embedding_is_head = "lm_head" not in model
    for module in model.modules():
        if isinstance(module, FloatProductEmbedding) and not embedding_is_head:
            continue
        if isinstance(module, FloatProduct):
            yield module
