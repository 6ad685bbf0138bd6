"""A small Llama in PyTorch whose parameters carry the names that mlx-lm expects."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from attention import causal_attention
from safetensors.torch import load_file, save_file


@dataclass
class ModelConfig:
    """The sizes of the model, under the names of mlx-lm's `config.json`."""

    vocab_size: int = 4096
    hidden_size: int = 320
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (the half-split form, as in mlx-lm)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        query_width = config.num_attention_heads * size
        key_width = config.num_key_value_heads * size
        self.q_proj = nn.Linear(hidden, query_width, bias=False)
        self.k_proj = nn.Linear(hidden, key_width, bias=False)
        self.v_proj = nn.Linear(hidden, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden]; cos, sin: [T, head_dim / 2]."""
        queries, keys, values = self.project(x, cos, sin)
        out = causal_attention(queries, keys, values)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x, cos, sin):
        """Rotated queries [B, H, T, D], rotated keys and values [B, Hkv, T, D]."""
        batch, length, _ = x.shape

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, length, -1, self.config.head_dim).transpose(1, 2)

        queries, keys, values = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        return rotate(queries, cos, sin), rotate(keys, cos, sin), values


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: turns the pairs (x[d], x[d + D/2])."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden]; cos, sin: [T, head_dim / 2]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embedding, blocks, final norm; the embedding is also the output layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        residual = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual if into_residual else 0.02)
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        position = torch.arange(config.max_position_embeddings).float()
        angles = torch.outer(position, config.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> the normed residual stream [B, T, hidden]."""
        x = self.embed_tokens(ids)
        kind = (
            torch.get_autocast_dtype(x.device.type)
            if torch.is_autocast_enabled(x.device.type)
            else x.dtype
        )
        cos, sin = (y[: ids.shape[1]].to(kind) for y in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def round_weights(self, ternary: bool) -> None:
        """Switch the rounding of a BitNet's weights on or off; a Llama has none."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> logits [B, T, vocab]."""
        return F.linear(self.hidden(ids), self.embed_tokens.weight)


def chunk_loss(rows, table, targets, weights):
    """Of rows [n, C]: each token's cross-entropy [n], and the weighted sum's gradients.

    These are by the rows [n, C] and by the table [V, C].
    """
    wanted = targets[:, None]
    grad = (rows @ table.T).float().softmax(-1)
    losses = -grad.gather(1, wanted).squeeze(1).clamp_min(1e-30).log()
    grad.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=grad.dtype))
    grad = grad.mul_(weights[:, None]).to(rows.dtype)
    return losses, grad @ table, grad.T @ rows


class ChunkedCrossEntropy(torch.autograd.Function):
    """Output layer and weighted cross-entropy in one, a chunk of tokens at a time.

    The logits of a whole batch (tokens x vocabulary) would be the largest array of the training
    step by far; here each chunk's gradient is taken while its logits are still in the cache.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, kind, chunk=1024, one_chunk=chunk_loss):
        """From hidden [N, C], weight [V, C], targets [N], weights [N]: sum of w ce, and ce."""
        table = weight.to(kind)
        losses = torch.empty(len(targets), device=hidden.device)
        grad_hidden = torch.empty(hidden.shape, dtype=kind, device=hidden.device)
        grad_weight = torch.zeros_like(weight)
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            losses[part], grad_hidden[part], grad = one_chunk(
                hidden[part].to(kind), table, targets[part], weights[part]
            )
            grad_weight += grad.float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        """The gradients taken in `forward`, times that of the loss."""
        grad_hidden, grad_weight = ctx.saved_tensors
        nothing = (None,) * 5
        return grad_hidden.float() * grad_loss, grad_weight * grad_loss, *nothing


def save_model(model: Llama, folder: Path, kind: torch.dtype = torch.float16) -> None:
    """Write `model.safetensors` and `config.json` in mlx-lm's own layout."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": value.detach().to("cpu", kind).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.config),
        "rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": str(kind).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path) -> Llama:
    """Read a model written by `save_model`, in float32."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama(ModelConfig(**{k: config[k] for k in ModelConfig.__dataclass_fields__}))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
    return model
