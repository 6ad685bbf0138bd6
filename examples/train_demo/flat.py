"""The Llama of `model.py`, computed so that `torch.compile` serves every length of sequence.

All but the attention treats tokens one by one. Those parts see [tokens, channels], and a batch has
the same number of tokens whatever its length: each is compiled once, in the first step, and not for
every length. Weights are float32 and the products bfloat16, cast inside the compiled parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from attention import causal_attention
from model import ChunkedCrossEntropy, Llama, ModelConfig

LOSS_CHUNK = 16384  # tokens whose logits are there at a time


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in float32, of x [N, C]."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def before_attention(x, weight, eps, q_weight, k_weight, v_weight, cos, sin):
    """From x [N, C] and cos, sin [N, 1, D / 2]: queries, keys and values [N, heads, D], rotated."""
    size = 2 * cos.shape[-1]
    together = torch.cat([q_weight, k_weight, v_weight]).to(x.dtype)
    heads = F.linear(norm(x, weight, eps), together).view(len(x), -1, size)
    # Three arrays of their own: views of one would be split outside of the compiled part.
    queries, keys, values = heads.split([len(w) // size for w in (q_weight, k_weight, v_weight)], 1)
    return turn(queries, cos, sin), turn(keys, cos, sin), values.contiguous()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`model.rotate` in float32: in bfloat16 the angles of far positions are too coarse."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def after_attention(x, mixed, o_weight, weight, eps, gate_weight, up_weight, down_weight):
    """The rest of a block: x [N, C] and the attention's output mixed [N, heads * D] -> [N, C]."""
    x = x + F.linear(mixed, o_weight.to(x.dtype))
    together = torch.cat([gate_weight, up_weight]).to(x.dtype)
    gate, up = F.linear(norm(x, weight, eps), together).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down_weight.to(x.dtype))


def loss_part(rows, table, targets, weights):
    """`model.chunk_loss` in a form that compiles into few kernels."""
    logits = (rows @ table.T).float()
    most = logits.amax(-1, keepdim=True)
    exp = (logits - most).exp()
    total = exp.sum(-1, keepdim=True)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    losses = (total.log() + most).squeeze(1) - torch.where(hit, logits, 0.0).sum(-1)
    grad = ((exp / total - hit.float()) * weights[:, None]).to(rows.dtype)
    return losses, grad @ table, grad.T @ rows


class FlatLlama(Llama):
    """`model.Llama`, and `losses` to train it with; what is written and read is the same."""

    def __init__(self, config: ModelConfig, kind: torch.dtype):
        super().__init__(config)
        self.kind = kind
        plain = {"norm": norm, "before": before_attention, "after": after_attention}
        self.plain: dict[str, Callable] = {**plain, "loss": loss_part}
        self.compiled = dict(self.plain)

    def compile_parts(self) -> None:
        """Compile what training calls. Each part then takes batches of one number of tokens."""
        self.compiled = {k: torch.compile(f, dynamic=False) for k, f in self.plain.items()}

    def hidden(self, ids: torch.Tensor, parts: dict[str, Callable] | None = None) -> torch.Tensor:
        """Token ids [B, T] -> the normed residual stream [B, T, hidden].

        parts: `self.compiled` in training; evaluation has batches of any size.
        """
        call, (batch, length) = parts or self.plain, ids.shape
        position = torch.arange(length, device=ids.device).repeat(batch)
        cos, sin = (table[position].unsqueeze(1) for table in (self.cos, self.sin))
        x = self.embed_tokens(ids.flatten()).to(self.kind)
        for layer in self.layers:
            heads, mlp, eps = layer.self_attn, layer.mlp, self.config.rms_norm_eps
            projections = (p.weight for p in (heads.q_proj, heads.k_proj, heads.v_proj))
            flat = call["before"](x, layer.input_layernorm.weight, eps, *projections, cos, sin)
            mixed = causal_attention(
                *(y.unflatten(0, (batch, length)).transpose(1, 2) for y in flat)
            )
            x = call["after"](
                x,
                mixed.transpose(1, 2).reshape(batch * length, -1),
                heads.o_proj.weight,
                layer.post_attention_layernorm.weight,
                eps,
                mlp.gate_proj.weight,
                mlp.up_proj.weight,
                mlp.down_proj.weight,
            )
        return call["norm"](x, self.norm.weight, self.config.rms_norm_eps).unflatten(
            0, (batch, length)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> logits [B, T, vocab]."""
        return F.linear(self.hidden(ids), self.embed_tokens.weight.to(self.kind))

    def losses(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From ids [B, T + 1] and weights [B, T]: the weighted sum, and the losses [B, T]."""
        hidden = self.hidden(ids[:, :-1], self.compiled).flatten(0, 1)
        loss, each = ChunkedCrossEntropy.apply(
            hidden,
            self.embed_tokens.weight,
            ids[:, 1:].flatten(),
            weights.flatten(),
            self.kind,
            LOSS_CHUNK,
            self.compiled["loss"],
        )
        return loss, each.view(weights.shape)
