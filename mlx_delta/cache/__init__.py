"""Held keys and their values: stores, the caches that mlx-lm works with, and files of them."""

from .batch import BatchDeltaKVCache
from .held import HeldKeys
from .mlx_lm_store import teach_store
from .rewinding import length_of, rewind
from .single import DeltaKVCache

teach_store()

__all__ = ["BatchDeltaKVCache", "DeltaKVCache", "HeldKeys", "length_of", "rewind"]
