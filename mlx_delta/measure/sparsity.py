"""How much of QK^T the held keys save: multiply-accumulates skipped / all causal ones.

Nothing is counted while the model runs. Each cache keeps how many deltas of each encoded block
are zero; which queries saw which blocks as held follows from their positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_delta.cache import HeldKeys
from mlx_delta.cache.check_state import leaves
from mlx_delta.cache.dropping import Dropping
from mlx_delta.config import DeltaConfig


@dataclass(frozen=True)
class Sparsity:
    """Sparsity of the queries of one text, as fractions of 1.

    Attributes:
        prefill: Over the prompt's queries.
        decode: Over the queries after the prompt.
        overall: Over both.
        paper: The paper's own formula, ``zeros(delta) / numel(delta) * (1 - w / L)``, with the
            longest exact span as ``w``.
        prefill_heads: [layers, kv heads], ``prefill`` for each of them.
        decode_heads: [layers, kv heads], ``decode`` for each of them.
    """

    prefill: float
    decode: float
    overall: float
    paper: float
    prefill_heads: np.ndarray
    decode_heads: np.ndarray


def measure_sparsity(caches: Sequence[Any], prompt_tokens: int, row: int = 0) -> Sparsity:
    """Sparsity of the text in a model's caches.

    Layers without held keys (sliding-window layers, a dense model) are left out of the mean;
    with none at all every figure is 0. Tokens that were generated and then rewound are not
    counted.

    Args:
        caches: The caches of a model.
        prompt_tokens: How many of the tokens were prefilled.
        row: Which row of the batch.

    Returns:
        The figures, averaged over layers and kv heads.
    """
    layers = [c for c in leaves(caches) if isinstance(c, HeldKeys) and not c.empty()]
    if not layers:
        return Sparsity(0.0, 0.0, 0.0, 0.0, np.zeros((0, 0)), np.zeros((0, 0)))
    length = layers[0].lengths[row]
    prompt = min(prompt_tokens, length)
    prefill = np.stack([_skipped(c, 0, prompt, row) for c in layers])
    decode = np.stack([_skipped(c, prompt, length, row) for c in layers])
    prefill_pairs, decode_pairs = causal_pairs(0, prompt), causal_pairs(prompt, length)
    return Sparsity(
        prefill=float(prefill.mean() / max(1, prefill_pairs)),
        decode=float(decode.mean() / max(1, decode_pairs)),
        overall=float((prefill + decode).mean() / max(1, prefill_pairs + decode_pairs)),
        paper=float(np.mean([_paper(c, length, row) for c in layers])),
        prefill_heads=prefill / max(1, prefill_pairs),
        decode_heads=decode / max(1, decode_pairs),
    )


def share_of_zeros(caches: Sequence[Any], row: int = 0) -> float:
    """Share of the deltas of all held keys that are zero, whichever queries see them.

    Over the elements of encoded blocks, keyframes among them; 0 if there are none.
    """
    layers = [_block_zeros(c, row) for c in caches if isinstance(c, HeldKeys) and not c.empty()]
    sizes = [c.block_sizes[row] for c in caches if isinstance(c, HeldKeys) and not c.empty()]
    total = sum(z.size * size * head_dim for (z, head_dim), size in zip(layers, sizes, strict=True))
    return float(sum(z.sum() for z, _ in layers) / total) if total else 0.0


def causal_pairs(first: int, end: int) -> int:
    """Pairs of a query in [first, end) and a key up to it."""
    return (end * (end + 1) - first * (first + 1)) // 2


def _skipped(cache: HeldKeys, first: int, end: int, row: int) -> np.ndarray:
    """Pairs that queries in [first, end) need not compute, per kv head [Hkv].

    In units of a whole key: zeros / head_dim. A block that was dropped counts as a whole from then
    on; how much of it was zero before is not known any more, and counts as nothing.
    """
    zeros, head_dim = _block_zeros(cache, row)
    first = max(first, min(end, cache.held_from))  # those before saw full keys only
    blocks, gone = cache.encoded[row], cache.dropped[row]
    queries = queries_of_blocks(_row_config(cache, row), blocks, first, end)
    dropping = Dropping.of(cache.config)
    if dropping is None or not gone:
        return zeros @ queries / head_dim
    skipped = zeros @ queries[dropping.kept(blocks, gone)] / head_dim
    for block in range(dropping.first, dropping.first + gone):
        left = dropping.left_from(block)
        if left is not None:
            skipped += max(0, end - max(first, left)) * cache.config.block_size
    return skipped


def queries_of_blocks(config: DeltaConfig, n_blocks: int, first: int, end: int) -> np.ndarray:
    """How many of the queries in [first, end) see each of the first blocks as held.

    A query sees block ``b`` as held from position ``(b + window_blocks + 1) * block_size`` on.
    """
    seen_from = (np.arange(n_blocks) + config.window_blocks + 1) * config.block_size
    return np.maximum(0, end - np.maximum(first, seen_from))


def _block_zeros(cache: HeldKeys, row: int) -> tuple[np.ndarray, int]:
    """Zero deltas of each encoded block [Hkv, blocks], and head_dim."""
    blocks = cache.encoded[row] - cache.dropped[row]
    return np.array(cache.zeros[row, :, :blocks], np.int64), cache.head_dim


def _row_config(cache: HeldKeys, row: int) -> DeltaConfig:
    """The setting of one row: with its own block size."""
    return dataclasses.replace(cache.config, block_size=cache.block_sizes[row])


def _paper(cache: HeldKeys, length: int, row: int) -> float:
    zeros, head_dim = _block_zeros(cache, row)
    config = _row_config(cache, row)
    if not zeros.size:
        return 0.0
    span = min(config.window + config.block_size, length)
    return float(zeros.mean() / (config.block_size * head_dim) * (1 - span / length))


def measure_density(caches: Sequence[Any]) -> float | None:
    """The part of a prompt's tiles that a prefill by tiles computed, over all layers and kv heads.

    Of the queries that chose: those at a prompt's start and end compute all they see, and are not
    counted. ``None`` where none chose.
    """
    counts = [c.tile_count for c in caches if isinstance(c, HeldKeys)]
    seen = sum(count.all for count in counts)
    return sum(count.computed for count in counts) / seen if seen else None
