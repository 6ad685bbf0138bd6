"""Held keys and their values: stores, the caches that mlx-lm works with, and files of them."""

from . import in_mlx_lm
from .batch import BatchDeltaKVCache
from .check_state import length_of
from .held import HeldKeys
from .rewinding import rewind
from .single import DeltaKVCache

in_mlx_lm.enter()

__all__ = ["BatchDeltaKVCache", "DeltaKVCache", "HeldKeys", "length_of", "rewind"]
