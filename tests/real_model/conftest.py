"""SmolLM2-135M-Instruct, fetched once into the cache; skipped only where there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_delta import load
from mlx_delta.checkpoint.catalogue import CATALOGUE
from mlx_delta.checkpoint.fetch import NotReachedError, fetch
from mlx_delta.system.folders import cache_folder

NAME = "smollm2"


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    """The model as ``--model smollm2`` loads it, and its tokenizer."""
    try:
        return load(NAME)
    except NotReachedError as error:
        pytest.skip(f"{NAME} can't be fetched: {error}")


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> Path:
    """The file that the model was converted from; kept beside the converted ones."""
    entry = CATALOGUE[NAME]
    kept = cache_folder() / "sources" / entry.file
    if kept.is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = fetch(entry, tmp_path_factory.mktemp("gguf"))
    except NotReachedError as error:
        pytest.skip(f"{NAME} can't be fetched: {error}")
    half = kept.with_suffix(".partial")
    half.write_bytes(file.read_bytes())
    half.rename(kept)
    return kept
