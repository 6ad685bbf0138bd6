"""A tiny model, a tokenizer and data for lm-evaluation-harness's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_delta.loading import find_model
from tests.evaluate.harness_data import write_tasks
from tests.tiny import llama_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find_model("demo"))


@pytest.fixture(scope="module")
def model() -> Any:
    return llama_model()
