"""BitNet b1.58 with hybrid delta attention: mlx-lm's model, with attention and caches replaced.

mlx-lm's ternary layers run on Metal only. Elsewhere the codes are unpacked and multiplied with
plain operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import bitnet
from mlx_lm.models.bitlinear_layers import BitLinear as MetalBitLinear
from mlx_lm.models.cache import KVCache

from ..cache import _HeldKeys
from .common import attend, make_delta_caches, normalize_rope, read_delta


@dataclass
class ModelArgs(bitnet.ModelArgs):
    """mlx-lm's arguments, the setting of the delta (``None``: dense), and how weights are packed.

    ``quantization_config`` is the checkpoint's own; its ``linear_class`` says whether the scale
    multiplies the ternary codes (``autobitlinear``) or divides them (``bitlinear``).
    """

    delta: Any = None  # DeltaConfig, or a dict or None as in config.json
    quantization_config: dict | None = None

    def __post_init__(self) -> None:
        """Read the setting as it stands in a config.json."""
        self.delta = read_delta(self.delta)

    @classmethod
    def from_dict(cls, params: dict) -> ModelArgs:
        """Arguments from a config.json, in either spelling of the rope settings."""
        return super().from_dict(normalize_rope(params))


def unpack_ternary(packed: mx.array) -> mx.array:
    """Ternary values -1, 0, 1 as int8 [out, in], from four codes a byte.

    Bits 2k and 2k + 1 of byte (r, c) of ``packed``, uint8 [out / 4, in], hold the code (value
    + 1) of row r + k * out / 4.
    """
    codes = [(packed >> shift) & 3 for shift in (0, 2, 4, 6)]
    return mx.concatenate(codes, axis=0).astype(mx.int8) - 1


class BitLinear(MetalBitLinear):
    """mlx-lm's ternary layer, which also runs without Metal."""

    def execute_matmul_kernel(self, x: mx.array, packed_weights: mx.array) -> mx.array:
        """Multiply x [..., in] with the unpacked, scaled weights; [..., out]."""
        if mx.metal.is_available():
            return super().execute_matmul_kernel(x, packed_weights)
        # float32: sums of thousands of terms lose too much in bf16.
        output = x.astype(mx.float32) @ unpack_ternary(packed_weights).astype(mx.float32).T
        scale = self.weight_scale.astype(mx.float32)
        output = output / scale if self.invert_weight_scales else output * scale
        return output.astype(x.dtype)


class Attention(bitnet.Attention):
    """mlx-lm's attention, reading held keys where the cache has them."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend; x is [B, L, hidden], mask None, "causal" or an array."""
        if not isinstance(cache, _HeldKeys):
            return super().__call__(x, mask, cache)
        return self.o_proj(self.attn_sub_norm(attend(self, x, mask, cache)))


class Model(bitnet.Model):
    """mlx-lm's BitNet. With a setting it attends with the delta, also when given no cache."""

    args: ModelArgs

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        for layer in self.layers:
            if args.delta is not None:
                layer.self_attn = Attention(args)
            self._replace_linears(layer, args)

    def _replace_linears(self, layer: Any, args: ModelArgs) -> None:
        """Put our ternary layers where mlx-lm's are, under the same names."""
        linear_class = (args.quantization_config or {}).get("linear_class", "autobitlinear")
        for parent in (layer.self_attn, layer.mlp):
            for name, module in parent.children().items():
                if isinstance(module, MetalBitLinear):
                    new = BitLinear(
                        module.in_features,
                        module.out_features,
                        bias="bias" in module and module.bias is not None,
                        invert_weight_scales=linear_class != "autobitlinear",
                    )
                    setattr(parent, name, new)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits [B, L, vocabulary] of inputs [B, L]."""
        if cache is None and self.args.delta is not None:
            cache = self.make_cache()
        return super().__call__(inputs, cache)

    def make_cache(self, prompt_length: int | None = None) -> list[Any]:
        """A new cache for each layer; see ``make_delta_caches`` for ``prompt_length``."""
        if self.args.delta is None:
            return [KVCache() for _ in self.layers]
        return make_delta_caches(self.layers, self.args.delta, prompt_length)
