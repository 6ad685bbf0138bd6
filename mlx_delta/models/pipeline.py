"""Llama's layers in a pipeline of several processes, as mlx-lm runs other models in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.pipeline import PipelineMixin

from mlx_delta.cache import HeldKeys


class Layers(PipelineMixin, llama.LlamaModel):
    """mlx-lm's layers of a Llama, of which a process may have a part.

    The last process has the first layers and hands what they make of a text to the one before it.
    """

    def __init__(self, args: llama.ModelArgs):
        # mlx-lm's mixin passes no arguments on.
        llama.LlamaModel.__init__(self, args)
        self.pipeline_rank, self.pipeline_size = 0, 1
        self.start_idx, self.end_idx = 0, None

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """What the layers make of inputs [B, L]; [B, L, hidden]."""
        if self.pipeline_size == 1:
            return super().__call__(inputs, cache, input_embeddings)
        layers = self.pipeline_layers
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        caches = [None] * len(layers) if cache is None else cache
        masks = self._masks(h, layers, caches)
        if self.pipeline_rank < self.pipeline_size - 1:
            h = mx.distributed.recv_like(h, self.pipeline_rank + 1)
        for layer, own in zip(layers, caches, strict=True):
            h = layer(h, masks[layer.use_sliding], cache=own)
        if self.pipeline_rank != 0:
            h = mx.distributed.send(h, self.pipeline_rank - 1)
            wait_for(caches[-1], h)
        # All go on from the last layer's, and so to the same token.
        h = mx.distributed.all_gather(h)[: h.shape[0]]
        return self.norm(h)

    def _masks(self, h: mx.array, layers: Sequence[Any], caches: Sequence[Any]) -> dict[bool, Any]:
        """The mask of full layers (false) and of those with a window, as far as there are any."""
        masks: dict[bool, Any] = {}
        for layer, cache in zip(layers, caches, strict=True):
            if layer.use_sliding not in masks:
                window = self.sliding_window if layer.use_sliding else None
                masks[layer.use_sliding] = create_attention_mask(h, cache, window_size=window)
        return masks


def wait_for(cache: Any, sent: mx.array) -> None:
    """Let a cache be evaluated only together with ``sent``.

    While a prompt is read, nothing but the caches is: what is sent would stay.
    """
    if isinstance(cache, HeldKeys):
        cache.wait_for(sent)
    elif cache is not None:
        cache.keys = mx.depends(cache.keys, sent)
