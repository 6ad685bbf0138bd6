"""Files that people saved with an earlier version load, and go on as they did."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.utils import load_model

import mlx_delta
from mlx_delta import BatchDeltaKVCache, DeltaKVCache
from tests.fixtures import make

NAMES = [*make.SETTINGS, "batch_dense", "batch_packed4"]


@pytest.fixture(scope="module")
def model():
    model, _ = mlx_delta.load(make.HERE / "model")
    model.set_dtype(mx.float32)  # as it was where there is no GPU
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_cache_gives_the_logits_that_it_gave(name, model):
    caches, metadata = load_prompt_cache(str(make.HERE / f"{name}.safetensors"), True)
    assert metadata == {"made": "0.1.0"}
    batch = name.startswith("batch")
    assert {type(cache) for cache in caches} == {BatchDeltaKVCache if batch else DeltaKVCache}
    wanted = np.load(make.HERE / "logits.npz")
    for i, logits in enumerate(make.follow(model, caches, len(make.ROWS) if batch else 1)):
        np.testing.assert_allclose(logits, wanted[f"{name}_{i}"], atol=2e-5)


@pytest.mark.parametrize("name", make.SETTINGS)
def test_the_text_fed_today_gives_them_too(name, model):
    """So it is the same encoding that the file holds, and not only a file that can be read."""
    caches = make.caches_of(model, make.SETTINGS[name], make.LENGTH)
    wanted = np.load(make.HERE / "logits.npz")
    for i, logits in enumerate(make.follow(model, caches)):
        # A prompt's attention is summed up in another order now: a key or code may round otherwise.
        np.testing.assert_allclose(logits, wanted[f"{name}_{i}"], atol=4e-3)


def test_mlx_lm_runs_the_converted_directory_by_the_file_in_it(model):
    through_shim, config = load_model(make.HERE / "model", trust_remote_code=True)
    assert config["delta"]["block_size"] == 8
    text = make.tokens(40)
    through_shim.set_dtype(mx.float32)
    np.testing.assert_allclose(through_shim(text), model(text), atol=2e-5)
