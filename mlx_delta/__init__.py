"""Hybrid delta attention (DeltaLLM, arXiv 2507.19608) for language models on MLX.

Importing the package imports neither MLX nor mlx-lm, which take seconds: the names below are
imported when they are first used. What the import changes elsewhere is in ``system/startup.py``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .system.startup import start
from .version import VERSION

__version__ = VERSION

start(Path(__file__).parent)

if TYPE_CHECKING:
    from .cache import BatchDeltaKVCache, DeltaKVCache
    from .config import DeltaConfig
    from .generate import batch_generate, generate, stream_generate
    from .loading import load
    from .measure.sparsity import Sparsity, measure_sparsity
    from .models.any import apply, remove

__all__ = [
    "BatchDeltaKVCache",
    "DeltaConfig",
    "DeltaKVCache",
    "Sparsity",
    "apply",
    "batch_generate",
    "generate",
    "load",
    "measure_sparsity",
    "remove",
    "stream_generate",
]

_MODULES = {
    "BatchDeltaKVCache": "cache.batch",
    "DeltaConfig": "config",
    "DeltaKVCache": "cache.single",
    "Sparsity": "measure.sparsity",
    "apply": "models.any",
    "batch_generate": "generate",
    "generate": "generate",
    "load": "loading",
    "measure_sparsity": "measure.sparsity",
    "remove": "models.any",
    "stream_generate": "generate",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


class _Package(ModuleType):
    """The package, whose function ``generate`` has the name of the package it lives in."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a module makes it an attribute of its package: that must not hide the function.
        if name == "generate" and isinstance(value, ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
