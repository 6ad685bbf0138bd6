"""A small BitNet b1.58 in PyTorch: the Llama of `model.py` with ternary layers and sub-norms.

The architecture of microsoft/bitnet-b1.58-2B-4T (arXiv 2504.12285): ternary weights and int8
activations in every projection, squared ReLU, a norm before each output projection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from attention import causal_attention
from model import MLP, Attention, Llama, ModelConfig, save_model


@dataclass
class BitNetConfig(ModelConfig):
    """The sizes; hidden_size must be heads * head_dim, and all widths multiples of 128."""

    hidden_size: int = 384
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 128
    intermediate_size: int = 768
    rope_theta: float = 500000.0


class TernaryProduct(torch.autograd.Function):
    """int8(x) @ ternary(weight).T, with gradients as if nothing were rounded (straight-through).

    Codes and integers up to 127 are exact in bfloat16, so autocast changes nothing but the
    rounding of the sums.
    """

    @staticmethod
    def forward(ctx, x, weight):
        """From x [..., in] and full-precision weight [out, in]; [..., out]."""
        autocast = torch.is_autocast_enabled(x.device.type)
        kind = torch.get_autocast_dtype(x.device.type) if autocast else torch.float32
        mean = weight.abs().mean().clamp_min(1e-5)
        codes = (weight * (1.0 / mean)).round().clamp(-1, 1).to(kind)
        scale = 127.0 / x.float().abs().amax(-1, keepdim=True).clamp_min(1e-5)
        integers = (x.float() * scale).round().clamp(-128, 127).to(kind)
        ctx.save_for_backward(integers, scale, codes, mean)
        return (F.linear(integers, codes) * (mean / scale)).to(kind)

    @staticmethod
    def backward(ctx, grad):
        """The gradients of x and of the weight."""
        integers, scale, codes, mean = ctx.saved_tensors
        grad_x = (grad.to(codes.dtype) @ codes) * mean
        rows = (grad / scale).to(codes.dtype).flatten(0, -2)
        return grad_x.to(grad.dtype), (rows.T @ integers.flatten(0, -2)).float()


class TernaryLinear(nn.Linear):
    """A linear layer that rounds its weights and its input whenever it runs."""

    ternary = True  # False: a plain linear layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]."""
        return TernaryProduct.apply(x, self.weight) if self.ternary else super().forward(x)


def make_ternary(module: nn.Module) -> None:
    """Put ternary layers in the place of a module's own linear ones."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, TernaryLinear(child.in_features, child.out_features, bias=False))


class BitAttention(Attention):
    """Grouped-query attention with a norm before the output projection."""

    def __init__(self, config: BitNetConfig):
        super().__init__(config)
        make_ternary(self)
        self.attn_sub_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden]; cos, sin: [T, head_dim / 2]."""
        out = causal_attention(*self.project(x, cos, sin))
        return self.o_proj(self.attn_sub_norm(out.transpose(1, 2).flatten(2)))


class BitMLP(MLP):
    """down(norm(relu(gate(x))^2 * up(x)))."""

    def __init__(self, config: BitNetConfig):
        super().__init__(config)
        make_ternary(self)
        self.ffn_sub_norm = nn.RMSNorm(config.intermediate_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden]."""
        return self.down_proj(
            self.ffn_sub_norm(F.relu(self.gate_proj(x)).square() * self.up_proj(x))
        )


class BitNet(Llama):
    """Embedding, ternary blocks, final norm; the embedding is also the output layer."""

    def __init__(self, config: BitNetConfig):
        super().__init__(config)
        residual = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        for layer in self.layers:
            layer.self_attn, layer.mlp = BitAttention(config), BitMLP(config)
            for name, parameter in layer.named_parameters():
                if parameter.ndim > 1:
                    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    nn.init.normal_(parameter, std=residual if into_residual else 0.02)

    def round_weights(self, ternary: bool) -> None:
        """Switch the rounding of weights and activations on or off."""
        for module in self.modules():
            if isinstance(module, TernaryLinear):
                module.ternary = ternary


def save_bitnet(model: BitNet, folder: Path) -> None:
    """Write the full-precision weights, as microsoft's -bf16 repository has them, in float32.

    mlx_delta loads and converts them: rounded in float32, the codes are those of the training.
    """
    save_model(model, folder, torch.float32)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        },
    }
    file.write_text(json.dumps(config, indent=2) + "\n")
