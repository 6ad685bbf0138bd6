"""What every record says of its caches, and the mean of it over records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_delta.measure.settings import cache_nbytes, far_share
from mlx_delta.measure.sparsity import measure_sparsity, share_of_zeros

SPARSITIES = ("prefill_sparsity", "decode_sparsity", "overall_sparsity")


def cache_figures(caches: Sequence[Any], prompt_tokens: int) -> dict[str, Any]:
    """Sparsity, also per layer and kv head, zeros among held deltas, and bytes of caches.

    ``far_share``: what far tokens take, of what they would as 16-bit floats; of caches that have
    any.
    """
    sparsity = measure_sparsity(caches, prompt_tokens)
    share = far_share(caches)
    figures = {} if share is None else {"far_share": round(share, 6)}
    return {
        "prefill_sparsity": round(sparsity.prefill, 6),
        "decode_sparsity": round(sparsity.decode, 6),
        "overall_sparsity": round(sparsity.overall, 6),
        "prefill_heads": np.round(sparsity.prefill_heads, 4).tolist(),
        "zero_deltas": round(share_of_zeros(caches), 6),
        "cache_bytes": cache_nbytes(caches),
        **figures,
    }


def mean_figures(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same, averaged over records."""
    figures: dict[str, Any] = {
        name: float(np.mean([record[name] for record in records])) for name in SPARSITIES
    }
    for name in ("zero_deltas", "far_share"):
        if all(name in record for record in records):  # files of older versions lack them
            figures[name] = float(np.mean([record[name] for record in records]))
    heads = np.mean([record["prefill_heads"] for record in records], axis=0)
    figures["prefill_heads"] = np.round(heads, 4).tolist()
    figures["cache_bytes"] = round(float(np.mean([record["cache_bytes"] for record in records])))
    return figures
