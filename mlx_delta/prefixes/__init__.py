"""Caches of prompts that are kept for later ones: cut into blocks, in memory and on disk.

A text's caches are cut where its blocks are (``leaves`` and ``pieces``): a block of keys depends on
nothing that follows it, so that texts which begin alike share their first blocks (``chain``). What
a block does not hold, full keys near the end among it, is kept for each place at which a text can
go on exactly. ``memory`` keeps both within a number of bytes, ``disk`` in a directory, and
``prefix_cache`` is what mlx-lm's server takes for its own store.
"""

from .disk import PrefixDirectory
from .fingerprint import fingerprint
from .pieces import Mark
from .prefix_cache import PrefixCache

__all__ = ["Mark", "PrefixCache", "PrefixDirectory", "fingerprint"]
