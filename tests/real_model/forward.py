"""A Llama in NumPy, float32, on the dequantized weights of a GGUF file.

It shares nothing with this library: the file is read by the package gguf, and rotary embeddings
are ggml's own (neighbouring pairs of rows), where the converter reorders the rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

Array = np.ndarray


class Llama:
    """Logits of a text, without caches or masks of ours."""

    def __init__(self, file: Path):
        reader = gguf.GGUFReader(file)
        self.weights = {
            t.name: dequantize(t.data, t.tensor_type)
            .astype(np.float32)
            .reshape([int(n) for n in reversed(t.shape)])
            for t in reader.tensors
        }

        def value(name: str) -> Any:
            field = reader.fields[f"llama.{name}"]
            return field.parts[field.data[0]][0].item()

        self.layers = value("block_count")
        self.heads = value("attention.head_count")
        self.eps = value("attention.layer_norm_rms_epsilon")
        self.base = value("rope.freq_base")

    def __call__(self, ids: list[int]) -> Array:
        """Logits [L, vocabulary]."""
        x = self.weights["token_embd.weight"][ids]
        for i in range(self.layers):
            x = x + self.attention(self.norm(x, f"blk.{i}.attn_norm"), f"blk.{i}.")
            x = x + self.feed_forward(self.norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.")
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return self.norm(x, "output_norm") @ head.T

    def norm(self, x: Array, name: str) -> Array:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return x * scale * self.weights[f"{name}.weight"]

    def attention(self, x: Array, at: str) -> Array:
        length, width = x.shape
        dim = width // self.heads
        queries, keys, values = (
            (x @ self.weights[f"{at}attn_{name}.weight"].T).reshape(length, -1, dim)
            for name in "qkv"
        )
        queries, keys = self.rotate(queries), self.rotate(keys)
        group = self.heads // keys.shape[1]
        future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        out = np.empty_like(queries)
        for h in range(self.heads):
            scores = queries[:, h] @ keys[:, h // group].T / np.sqrt(np.float32(dim)) + future
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            out[:, h] = shares @ values[:, h // group]
        return out.reshape(length, width) @ self.weights[f"{at}attn_output.weight"].T

    def rotate(self, x: Array) -> Array:
        """Rotary embedding of [L, H, D]: pairs (0, 1), (2, 3), ..."""
        length, _, dim = x.shape
        angles = np.arange(length)[:, None] * self.base ** (-np.arange(0, dim, 2) / dim)
        cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        return pairs.reshape(x.shape)

    def feed_forward(self, x: Array, at: str) -> Array:
        gate, up, down = (self.weights[f"{at}ffn_{name}.weight"] for name in ("gate", "up", "down"))
        opened = x @ gate.T
        return (opened / (1 + np.exp(-opened)) * (x @ up.T)) @ down.T
