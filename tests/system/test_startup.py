"""``import mlx_delta``: what it does elsewhere, and that it does no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mlx_delta
from mlx_delta.system import startup


def run(code: str) -> str:
    """What a new process prints; it must succeed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_neither_mlx_nor_mlx_lm_is_imported():
    heavy = ("mlx", "mlx_lm", "numpy", "transformers", "matplotlib", "lm_eval")
    code = f"import mlx_delta, mlx_delta.convert, sys; print(set({heavy}) & set(sys.modules))"
    assert run(code) == "set()"


def test_every_public_name_is_there():
    for name in [*mlx_delta.__all__, "BatchDeltaKVCache"]:
        assert getattr(mlx_delta, name).__name__ == name
        assert name in dir(mlx_delta)
    with pytest.raises(AttributeError, match="module 'mlx_delta' has no attribute 'nothing'"):
        mlx_delta.nothing  # noqa: B018


# Each process takes seconds to import mlx-lm, so that one asks for all that needs a new one.
@pytest.mark.parametrize(
    "imports",
    [
        "import mlx_delta; import mlx_lm.models.cache as names",
        "import mlx_lm.models.cache as names; import mlx_delta.generate.command",
    ],
    ids=["before mlx-lm", "after mlx-lm"],
)
def test_mlx_lm_reads_caches_of_ours_and_generate_is_a_function(imports, tmp_path):
    file = tmp_path / "cache.safetensors"
    code = f"""
{imports}
import mlx.core as mx
cache = mlx_delta.DeltaKVCache(mlx_delta.DeltaConfig(block_size=8, window=8))
keys = mx.random.normal((1, 2, 40, 16))
cache.update_and_fetch(keys, keys)
names.save_prompt_cache({str(file)!r}, [cache])
(read,) = names.load_prompt_cache({str(file)!r})
print(type(read) is mlx_delta.DeltaKVCache, read.offset, type(names.KVCache()).__name__)
print(names.__spec__.loader is names.__loader__, type(names.__loader__).__name__)
import mlx_delta.generate.command
from mlx_delta import generate
print(generate is mlx_delta.generate, type(generate).__name__, generate.__module__)
"""
    assert run(code).splitlines() == [
        "True 40 KVCache",
        "True SourceFileLoader",
        "True function mlx_delta.generate",
    ]


def test_a_wheels_kernels_are_not_taken_for_those_beside_it(tmp_path):
    for folder in ("mlx_delta/kernels", "mlx_delta/convert", "kernels", "convert"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    finder = startup.BesideFinder(tmp_path / "mlx_delta")
    assert finder.find_spec("mlx_delta.kernels", None) is None
    (tmp_path / "mlx_delta" / "kernels").rename(tmp_path / "gone")
    spec = startup.BesideFinder(tmp_path / "mlx_delta").find_spec("mlx_delta.kernels", None)
    assert spec is not None and spec.origin == str(tmp_path / "kernels" / "__init__.py")
    assert finder.find_spec("mlx_delta.tests", None) is None


def test_starting_again_adds_nothing():
    before = list(sys.meta_path)
    startup.start(startup.Path(mlx_delta.__file__).parent)
    assert sys.meta_path == before
