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
# Scores of a row that are compared side by side.
_COLUMNS = 64

_LOG2_E = 1.4426950408889634
# What hidden scores are set to: finite, so that a row that sees nothing has no NaN.
HIDDEN = -1e30

Text = tuple[mx.array, mx.array]  # keys and values


@dataclass(frozen=True)
class Far:
    """Keys, and values, that stand in for those far from a query.

    A query at position ``p`` reads them before ``(p // block_size - window_blocks) * block_size``.

    Attributes:
        keys: [B, Hkv, S or more, D]; read up to the last query's border only.
        block_size: Tokens in a block.
        window_blocks: Blocks before a query's own that are near.
        values: [B, Hkv, S or more, Dv]; ``None``: those of near keys.
    """

    keys: mx.array
    block_size: int
    window_blocks: int
    values: mx.array | None = None

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
    keys, values = keys.astype(mx.float32), with_ones(values[:, :, : start + steps])
    near, distant = (keys, values), (keys, values)
    if far is not None:
        own = values if far.values is None else with_ones(far.values)
        distant = far.keys.astype(mx.float32), own
    if mask is not None:
        mask = _grouped(mask, n_kv)
    last = None if mask is None or causal else start + steps
    outputs: list[mx.array] = []
    for first, end in query_blocks(start, steps, far):
        part = queries[:, :, :, first - start : end - start]
        if outputs:
            (part,) = mx.depends([part], [outputs[-1]])
        part = part.reshape(B, n_kv, group * (end - first), D)
        found: Weighted | None = None
        for source, left, right in _strips(first, last or end, part, far, near, distant):
            scores = part @ source[0][:, :, left:right].swapaxes(-1, -2)
            if mask is not None:
                rows = slice(first - start, end - start) if mask.shape[-2] > 1 else slice(None)
                seen = mask[..., rows, left:right] if mask.shape[-1] > 1 else mask[..., rows, :]
                scores = hide(scores, seen, group)
            elif right > first:
                scores = hide(scores, _causal(first, end, left, right), group)
            strip = Weighted.of(scores, source[1][:, :, left:right])
            found = strip if found is None else found.merged(strip)
        assert found is not None
        output = found.mean().reshape(B, n_kv, group, end - first, -1)
        outputs.append(output)
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=3)
    return joined.reshape(B, n_heads, steps, -1).astype(dtype)


def has_blocks(queries: mx.array) -> bool:
    """Whether this attention is the one for these queries [B, Hq, L, D] here."""
    on_cpu = not has_kernels() and mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and queries.shape[2] >= LEAST_QUERIES


@dataclass(frozen=True)
class Weighted:
    """Values under a softmax of some of the scores; more can be merged into it.

    Attributes:
        top: [..., R, 1], the largest score.
        sums: [..., R, Dv + 1], values times powers of two below it, and the sum of these.
    """

    top: mx.array
    sums: mx.array

    @classmethod
    def of(cls, scores: mx.array, values: mx.array) -> Weighted:
        """Scores [..., R, N], in powers of two, of values [..., N, Dv + 1], the last 1."""
        # In a softmax the maximum cancels, so it has no gradient.
        top = mx.stop_gradient(row_max(scores))
        return cls(top, exp2_below(scores, top) @ values)

    def merged(self, other: Weighted) -> Weighted:
        """Of all scores of both."""
        top = mx.maximum(self.top, other.top)
        return Weighted(
            top,
            self.sums * exp2_below(self.top, top) + other.sums * exp2_below(other.top, top),
        )

    def mean(self) -> mx.array:
        """The weighted mean, [..., R, Dv]."""
        # Powers of two of NaN are not NaN: where the largest score is, so is the output.
        return self.sums[..., :-1] / self.sums[..., -1:] + 0 * self.top


def with_ones(values: mx.array) -> mx.array:
    """Values [..., N, Dv] in float32 and a column of ones, which adds up the weights.

    The product with the weights does so at no cost; a sum by itself is slow.
    """
    values = values.astype(mx.float32)
    return mx.concatenate([values, mx.ones((*values.shape[:-1], 1))], axis=-1)


def row_max(scores: mx.array) -> mx.array:
    """The largest of each row, [..., R, 1]; column against column first, which MLX vectorizes."""
    *rows, length = scores.shape
    if length > _COLUMNS and length % _COLUMNS == 0:
        scores = scores.reshape(*rows, length // _COLUMNS, _COLUMNS).max(axis=-2)
    return scores.max(axis=-1, keepdims=True)


def query_blocks(start: int, steps: int, far: Far | None) -> list[tuple[int, int]]:
    """Cut positions into blocks, by absolute position; all queries of one have the same border."""
    cuts = {start, start + steps}
    size = QUERY_BLOCK if far is None else far.block_size
    for block in range(start // size * size, start + steps, size):
        cuts.update(range(block, min(block + size, start + steps), QUERY_BLOCK))
    edges = sorted(cut for cut in cuts if cut >= start)
    return list(zip(edges, edges[1:], strict=False))


def _strips(
    first: int, end: int, queries: mx.array, far: Far | None, near: Text, distant: Text
) -> Iterator[tuple[Text, int, int]]:
    """Keys and values before ``end`` for queries from ``first`` on, and where to slice them.

    Near keys come first: every query sees its own, so that the maximum is finite from then on.
    Strips are cut by absolute position, so that the sums do not depend on how a text is cut.
    """
    rows = queries.shape[0] * queries.shape[1] * queries.shape[2]
    width = max(1, STRIP_SCORES // (rows * _STRIP_MULTIPLE)) * _STRIP_MULTIPLE
    border = first if far is None else far.border(first)
    yield near, border, end
    for left in range(0, border, width):
        yield distant, left, min(left + width, border)


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
        scores = mx.where(seen, scores, HIDDEN)
    else:
        scores = mx.maximum(scores + seen.astype(mx.float32) * _LOG2_E, HIDDEN)
    return scores.reshape(shape)
