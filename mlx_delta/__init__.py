"""Hybrid delta attention (DeltaLLM, arXiv 2507.19608) for language models on MLX."""

from pathlib import Path

from .system.blas import preload_blas

preload_blas()  # before anything imports MLX

# In a checkout that is not installed, kernels/ and convert/ stand beside this directory.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

import mlx_lm.models.cache as _mlx_lm_cache  # noqa: E402

from .cache.batch import BatchDeltaKVCache  # noqa: E402
from .cache.single import DeltaKVCache  # noqa: E402
from .config import DeltaConfig  # noqa: E402
from .generate import batch_generate, generate, stream_generate  # noqa: E402
from .loading import load  # noqa: E402
from .measure.sparsity import Sparsity, measure_sparsity  # noqa: E402
from .models.any import apply, remove  # noqa: E402

__version__ = "0.1.0"

# mlx-lm's load_prompt_cache looks classes up by name in its own module.
vars(_mlx_lm_cache).update(DeltaKVCache=DeltaKVCache, BatchDeltaKVCache=BatchDeltaKVCache)

__all__ = [
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
