"""Exact attention of a prompt's queries by blocks, for machines without a GPU.

There MLX's attention computes all scores of a chunk, those above the diagonal included, and its
softmax goes element by element. Here a block of queries takes strips of keys that stay in the
cache, one after the other, with the running maximum and sum of the online softmax (Milakov and
Gimelshein, arXiv 1805.02867), and powers of two in place of ``exp``
(:mod:`mlx_delta.ops.exp2`). Query heads of a group share each product with their kv head's keys.

Everything stays lazy and differentiable. Each block waits for the one before, since MLX would
otherwise compute several side by side, out of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .backend import has_kernels
from .exp2 import exp2_below

# Fewer queries than this are served better by MLX's own attention.
LEAST_QUERIES = 32
# Queries of a block: more make larger products, fewer waste less above the diagonal.
QUERY_BLOCK = 64
# Scores of a strip, over all heads: what a processor's cache holds.
STRIP_SCORES = 1 << 19
_STRIP_MULTIPLE = 256

_LOG2_E = 1.4426950408889634
# What hidden scores are set to: finite, so that a row that sees nothing has no NaN.
_HIDDEN = -1e30


@dataclass(frozen=True)
class Far:
    """Keys that stand in for those far from a query.

    A query at position ``p`` reads them before ``(p // block_size - window_blocks) * block_size``.

    Attributes:
        keys: [B, Hkv, S or more, D]; read up to the last query's border only.
        block_size: Tokens in a block.
        window_blocks: Blocks before a query's own that are near.
    """

    keys: mx.array
    block_size: int
    window_blocks: int

    def border(self, position: int) -> int:
        """The first position that a query sees with its own key."""
        return max(0, position // self.block_size - self.window_blocks) * self.block_size


def exact_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    start: int = 0,
    mask: mx.array | None = None,
    far: Far | None = None,
    causal: bool = True,
) -> mx.array:
    """Attention of the queries from position ``start`` on, within 1e-5 of float32 softmax.

    Args:
        queries: [B, Hq, L, D]; query ``i`` is at position ``start + i``.
        keys: [B, Hkv, start + L or more, D].
        values: [B, Hkv, start + L or more, Dv].
        scale: Factor on the scores.
        start: Position of the first query.
        mask: What queries may see, boolean or additive, broadcasting to [B, Hq, L, start + L];
            ``None`` for all keys up to their own position.
        far: Keys to read in place of ``keys`` far from each query.
        causal: Whether the mask, if there is one, hides all keys after a query's own position;
            these are then not looked at.

    Returns:
        [B, Hq, L, Dv], of the queries' type; computed in float32.
    """
    B, n_heads, steps, D = queries.shape
    n_kv = keys.shape[1]
    group = n_heads // n_kv
    dtype = queries.dtype
    queries = (queries.astype(mx.float32) * (scale * _LOG2_E)).reshape(B, n_kv, group, steps, D)
    keys, values = keys.astype(mx.float32), values.astype(mx.float32)
    if far is not None:
        far = Far(far.keys.astype(mx.float32), far.block_size, far.window_blocks)
    if mask is not None:
        mask = _grouped(mask, n_kv)
    last = None if mask is None or causal else start + steps
    outputs: list[mx.array] = []
    for first, end in query_blocks(start, steps, far):
        part = queries[:, :, :, first - start : end - start]
        if outputs:
            (part,) = mx.depends([part], [outputs[-1]])
        part = part.reshape(B, n_kv, group * (end - first), D)
        softmax = OnlineSoftmax()
        for source, left, right in _strips(first, last or end, part, far, keys):
            scores = part @ source[:, :, left:right].swapaxes(-1, -2)
            if mask is not None:
                rows = slice(first - start, end - start) if mask.shape[-2] > 1 else slice(None)
                seen = mask[..., rows, left:right] if mask.shape[-1] > 1 else mask[..., rows, :]
                scores = hide(scores, seen, group)
            elif right > first:
                scores = hide(scores, _causal(first, end, left, right), group)
            softmax.add(scores, values[:, :, left:right])
        output = softmax.result().reshape(B, n_kv, group, end - first, -1)
        outputs.append(output)
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=3)
    return joined.reshape(B, n_heads, steps, -1).astype(dtype)


def has_blocks(queries: mx.array) -> bool:
    """Whether this attention is the one for these queries [B, Hq, L, D] here."""
    on_cpu = not has_kernels() and mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and queries.shape[2] >= LEAST_QUERIES


class OnlineSoftmax:
    """The weighted mean of values under a softmax of scores that come strip by strip."""

    def __init__(self) -> None:
        self._top: mx.array | None = None  # [..., R, 1]; the largest score so far
        self._sum: mx.array | None = None  # [..., R, 1]
        self._output: mx.array | None = None  # [..., R, Dv]

    def add(self, scores: mx.array, values: mx.array) -> None:
        """Take scores [..., R, N], in powers of two, of values [..., N, Dv]."""
        # In a softmax the maximum cancels, so it has no gradient.
        top = mx.stop_gradient(scores.max(axis=-1, keepdims=True))
        ones = mx.ones((scores.shape[-1], 1))  # a product adds up faster than MLX's sum
        if self._top is None or self._sum is None or self._output is None:
            weights = exp2_below(scores, top)
            self._sum, self._output = weights @ ones, weights @ values
        else:
            top = mx.maximum(top, self._top)
            weights, shrink = exp2_below(scores, top), exp2_below(self._top, top)
            self._sum = self._sum * shrink + weights @ ones
            self._output = self._output * shrink + weights @ values
        self._top = top

    @property
    def latest(self) -> mx.array:
        """What is computed once all that was added is, to wait for."""
        assert self._output is not None and self._sum is not None
        # Not the output alone: the weights would be kept until somebody asks for their sum.
        (latest,) = mx.depends([self._output], [self._sum])
        return latest

    def result(self) -> mx.array:
        """The weighted mean, [..., R, Dv]."""
        assert self._sum is not None and self._output is not None
        return self._output / self._sum


def query_blocks(start: int, steps: int, far: Far | None) -> list[tuple[int, int]]:
    """Cut positions into blocks, by absolute position; all queries of one have the same border."""
    cuts = {start, start + steps}
    size = QUERY_BLOCK if far is None else far.block_size
    for block in range(start // size * size, start + steps, size):
        cuts.update(range(block, min(block + size, start + steps), QUERY_BLOCK))
    edges = sorted(cut for cut in cuts if cut >= start)
    return list(zip(edges, edges[1:], strict=False))


def _strips(
    first: int, end: int, queries: mx.array, far: Far | None, keys: mx.array
) -> Iterator[tuple[mx.array, int, int]]:
    """Keys before ``end`` for queries from ``first`` on, as arrays and where to slice them.

    Near keys come first: every query sees its own, so that the maximum is finite from then on.
    Strips are cut by absolute position, so that the sums do not depend on how a text is cut.
    """
    rows = queries.shape[0] * queries.shape[1] * queries.shape[2]
    width = max(1, STRIP_SCORES // (rows * _STRIP_MULTIPLE)) * _STRIP_MULTIPLE
    border = first if far is None else far.border(first)
    yield keys, border, end
    source = keys if far is None else far.keys
    for left in range(0, border, width):
        yield source, left, min(left + width, border)


def _causal(first: int, end: int, left: int, right: int) -> mx.array:
    """Which keys each query sees, [end - first, right - left]."""
    return mx.arange(left, right) <= mx.arange(first, end)[:, None]


def _grouped(mask: mx.array, n_kv: int) -> mx.array:
    """A mask [B or 1, Hq or 1, L, S] as [B or 1, Hkv or 1, group or 1, L, S]."""
    mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    heads = (1, 1) if mask.shape[1] == 1 else (n_kv, mask.shape[1] // n_kv)
    return mask.reshape(mask.shape[0], *heads, *mask.shape[2:])


def hide(scores: mx.array, seen: mx.array, group: int) -> mx.array:
    """Scores [B, Hkv, group * L, N] under a mask that broadcasts to [B, Hkv, group, L, N]."""
    shape: Sequence[int] = scores.shape
    scores = scores.reshape(*shape[:2], group, -1, shape[-1])
    if seen.dtype == mx.bool_:
        scores = mx.where(seen, scores, _HIDDEN)
    else:
        scores = mx.maximum(scores + seen.astype(mx.float32) * _LOG2_E, _HIDDEN)
    return scores.reshape(shape)
