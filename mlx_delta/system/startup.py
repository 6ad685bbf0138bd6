"""All that ``import mlx_delta`` changes outside of itself, and why.

1. On Linux without a GPU an OpenBLAS is loaded, to serve MLX (see ``blas.py``). It works only
   before ``mlx.core`` is loaded, so it can't wait until a model is.
2. mlx-lm's ``load_prompt_cache`` looks classes of caches up by name in its own module, so that the
   names of ours are put there, as soon as somebody imports that module: mlx-lm takes seconds to
   import, which this does not do by itself. Until ``mlx_delta.cache`` is imported something stands
   in for the classes; then they take the place of those names, and mlx-lm's store of prompt caches
   asks them whether any number of tokens can be taken back exactly (``cache/in_mlx_lm.py``).
3. In a checkout ``kernels/`` and ``convert/`` stand beside the package. They are found as
   ``mlx_delta.kernels`` and ``mlx_delta.convert``, which they are in a wheel; nothing else that
   stands beside them (``tests``, ``docs``) is found under the package's name.

The package's own ``__init__.py`` says what is imported when.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from .blas import preload_blas

BESIDE = ("kernels", "convert")  # at the top of a checkout, inside the package once installed
MLX_LM_CACHES = "mlx_lm.models.cache"
# Where prompt-cache files' classes are: their names stand in the files.
CACHES = {
    "DeltaKVCache": "mlx_delta.cache.single",
    "BatchDeltaKVCache": "mlx_delta.cache.batch",
}


def start(package: Path) -> None:
    """Make the first three changes; again does nothing.

    Args:
        package: The directory of ``mlx_delta``.
    """
    preload_blas()
    if not any(isinstance(finder, BesideFinder) for finder in sys.meta_path):
        sys.meta_path[:0] = [BesideFinder(package), CacheNamesFinder()]
    if MLX_LM_CACHES in sys.modules:
        add_cache_names(sys.modules[MLX_LM_CACHES])


class BesideFinder(MetaPathFinder):
    """Finds ``kernels`` and ``convert`` in a checkout, where they stand beside the package.

    It is asked first: an editable install of another checkout would find that one's. Of a package
    that holds both, as a wheel's does, it finds neither; beside it may stand any ``kernels``.

    Args:
        package: The directory of ``mlx_delta``.
    """

    def __init__(self, package: Path):
        self.packages = {
            f"{package.name}.{name}": package.parent / name
            for name in BESIDE
            if not (package / name).is_dir()
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of the two packages."""
        folder = self.packages.get(fullname)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


class LaterCache:
    """Stands in mlx-lm's module for a class of ours until a file needs it.

    Args:
        name: The class.
    """

    def __init__(self, name: str):
        self.name = name

    def from_state(self, *state: Any) -> Any:
        """What the class makes of a file's content."""
        return getattr(importlib.import_module(CACHES[self.name]), self.name).from_state(*state)


def add_cache_names(module: ModuleType) -> None:
    """Put something that stands in for our caches into mlx-lm's module of caches."""
    for name in CACHES:
        vars(module).setdefault(name, LaterCache(name))


class CacheNamesFinder(MetaPathFinder):
    """Adds the names when mlx-lm's module of caches is imported; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that adds the names."""
        if fullname != MLX_LM_CACHES or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # once is enough, and the next line asks all finders
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = NamingLoader(spec.loader)
        return spec


class NamingLoader(Loader):
    """Loads a module as another loader does, then adds the names to it.

    Args:
        loader: The module's own.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, whose place it takes again; then the names."""
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        add_cache_names(module)
