"""A source's model, run in float32 one layer at a time, with weights that are read as needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .pipeline import STEP_ELEMENTS
from .weights import Source


def dequantize(layer: Any, rows: slice = slice(None)) -> mx.array:
    """A layer's weights, or some rows of them."""
    if not hasattr(layer, "scales"):
        return layer.weight[rows]
    parts = (layer.weight[rows], layer.scales[rows], layer.biases[rows])
    return mx.dequantize(*parts, layer.group_size, layer.bits)


class Streamed(nn.Module):
    """A linear layer whose weights are made when they are needed, some rows at a time.

    Args:
        rows: ``rows(start, stop)`` gives float32 weights [stop - start, in].
        outputs: Rows in all.
        step: Rows at a time.
        bias: What is added, if anything.
    """

    def __init__(
        self,
        rows: Callable[[int, int], mx.array],
        outputs: int,
        step: int,
        bias: mx.array | None = None,
    ):
        super().__init__()
        self._rows, self._outputs, self._step, self._bias = rows, outputs, step, bias

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply x [..., in]; [..., out]."""
        parts = []
        for start in range(0, self._outputs, self._step):
            stop = min(self._outputs, start + self._step)
            parts.append(x @ self._rows(start, stop).T)
            mx.eval(parts[-1])
        y = mx.concatenate(parts, axis=-1)
        return y if self._bias is None else y + self._bias


class Layers:
    """The source's model, float32, one layer in memory at a time."""

    def __init__(self, source: Source):
        from mlx_lm.models import bitnet, gemma3_text, llama

        self.source = source
        modules = {"bitnet": bitnet, "gemma3_text": gemma3_text}
        self._module: Any = modules.get(source.arch.model_type, llama)
        self._args = self._module.ModelArgs.from_dict({**source.config, **source.arch.entries()})

    def _vector(self, name: str) -> mx.array:
        weight = self.source.weights[name]
        return weight.dequantized(0, weight.shape[0])

    def _linear(self, path: str) -> Streamed:
        weight = self.source.weights[path + ".weight"]
        multiple = weight.row_multiple
        step = max(multiple, STEP_ELEMENTS // weight.shape[1] // multiple * multiple)
        bias = self._vector(path + ".bias") if path + ".bias" in self.source.weights else None
        return Streamed(weight.dequantized, weight.shape[0], step, bias)

    def embed(self, tokens: list[int]) -> mx.array:
        """[1, L, hidden]: only the rows of these tokens are read."""
        weight = self.source.weights["model.embed_tokens.weight"]
        rows = []
        for token in tokens:
            start = token // weight.row_multiple * weight.row_multiple
            part = weight.dequantized(start, min(weight.shape[0], start + weight.row_multiple))
            rows.append(part[token - start])
        return self.scale(mx.stack(rows)[None])

    def scale(self, hidden: mx.array) -> mx.array:
        """Embeddings as the first layer gets them: Gemma's are multiplied, in bfloat16's digits."""
        if not self.source.arch.windows:
            return hidden
        return hidden * mx.array(self.source.arch.hidden**0.5, mx.bfloat16).astype(hidden.dtype)

    def mask(self, index: int, hidden: mx.array) -> mx.array | str:
        """What a layer's queries may see, of the text alone [1, L, hidden]."""
        windows, length = self.source.arch.windows, hidden.shape[1]
        if windows is None or windows.is_full(index) or length <= windows.size:
            return "causal"
        away = mx.arange(length)[:, None] - mx.arange(length)
        return (away >= 0) & (away < windows.size)

    def run(self, index: int, hidden: mx.array) -> mx.array:
        """One layer."""
        numbered = (index,) if self.source.arch.windows else ()
        layer = self._module.TransformerBlock(self._args, *numbered)
        prefix = f"model.layers.{index}."
        linears = [path for path in self.source.arch.linears() if path.startswith(prefix)]
        for path in linears:
            parent, name = path.removeprefix(prefix).split(".")
            setattr(layer[parent], name, self._linear(path))
        norms = [
            (name.removeprefix(prefix), self._vector(name))
            for name in self.source.weights
            if name.startswith(prefix) and name.rpartition(".")[0] not in linears
        ]
        layer.load_weights(norms, strict=False)
        output = layer(hidden, mask=self.mask(index, hidden))
        mx.eval(output)
        return output

    def norm(self, hidden: mx.array) -> mx.array:
        """The last norm."""
        weight = self._vector("model.norm.weight")
        if self.source.arch.windows:
            weight = 1 + weight
        return mx.fast.rms_norm(hidden, weight, self._args.rms_norm_eps)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [1, L, vocabulary], some rows of the head at a time."""
        tied = self.source.arch.tied
        return self._linear("model.embed_tokens" if tied else "lm_head")(hidden)
