"""Held keys and their values: stores, the caches that mlx-lm works with, and files of them."""

from mlx_lm.models import cache as mlx_lm_cache

from mlx_delta.system.startup import add_cache_names

from .batch import BatchDeltaKVCache
from .held import HeldKeys
from .mlx_lm_store import teach_store
from .rewinding import length_of, rewind
from .single import DeltaKVCache

add_cache_names(mlx_lm_cache, DeltaKVCache, BatchDeltaKVCache)
teach_store()

__all__ = ["BatchDeltaKVCache", "DeltaKVCache", "HeldKeys", "length_of", "rewind"]
