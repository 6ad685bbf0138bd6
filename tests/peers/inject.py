"""mlx-lm's tests on our classes: what is put in place of what, for the length of one test.

* ``KVCache`` and ``BatchKVCache``, where a test file names them, become ours.
* Our caches get the attributes ``keys`` and ``values``, at which some tests look: what
  ``keys_and_values`` returns. Ours are stored otherwise.
* ``Model`` and ``ModelArgs`` of mlx-lm's Llama and BitNet become ours.
* The server's ``ResponseGenerator`` and ``APIHandler`` become ours.
* The hub model that the tests load becomes the bundled demo model. It is a base model, so its
  tokenizer is given a chat template.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.bitnet
import mlx_lm.models.llama
import mlx_lm.server
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_delta.models.bitnet
import mlx_delta.models.llama
from mlx_delta import DeltaConfig, DeltaKVCache
from mlx_delta.cache import BatchDeltaKVCache
from mlx_delta.loading import find_model
from mlx_delta.server.engine import Engine
from mlx_delta.server.handler import Handler

# `mlx_lm.generate` is the function of that name.
generate_module = importlib.import_module("mlx_lm.generate")

# A setting for each way to run them; None leaves mlx-lm's own classes in place.
SETTINGS: dict[str, DeltaConfig | None] = {
    "stock": None,
    # No prompt leaves the window: everything must be as with mlx-lm's own classes.
    "window-covers-all": DeltaConfig(window=4096),
    # Blocks so small that even these prompts of a few dozen tokens are mostly held: mlx-lm's
    # tests then compare our chunked, batched, copied, saved and rewound runs with the plain one.
    "delta-on": DeltaConfig(block_size=4, window=4, sinks=1),
    # The same with keys and values stored as codes.
    "codes": DeltaConfig(
        block_size=8, window=8, sinks=1, key_format="codes", key_bits=8, value_bits=8
    ),
}

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@contextlib.contextmanager
def injected(module: ModuleType, setting: DeltaConfig | None) -> Iterator[None]:
    """Put the substitutes for one setting in place, for an imported file of mlx-lm's tests."""
    with contextlib.ExitStack() as patches:

        def replace(owner: object, **names: object) -> None:
            for name, new in names.items():
                if hasattr(owner, name):
                    patches.enter_context(mock.patch.object(owner, name, new))

        replace(module, load=lambda _hub_model: load_demo(setting))
        replace(mlx_lm.server, scan_cache_dir=_downloaded_models)
        # Two tests leave another stream there; this puts the old one back.
        replace(generate_module, generation_stream=generate_module.generation_stream)
        if setting is not None:
            replace(module, KVCache=DeltaKVCache, BatchKVCache=BatchDeltaKVCache)
            replace(module, ResponseGenerator=Engine, APIHandler=Handler)
            for index, name in enumerate(("keys", "values")):
                view = property(lambda cache, index=index: cache.keys_and_values()[index])
                for cache in (DeltaKVCache, BatchDeltaKVCache):
                    patches.enter_context(mock.patch.object(cache, name, view, create=True))
            # The tests make caches without naming a setting.
            defaults = tuple(
                getattr(setting, field.name) for field in dataclasses.fields(DeltaConfig)
            )
            replace(DeltaConfig.__init__, __defaults__=defaults)
            for theirs, ours in (
                (mlx_lm.models.llama, mlx_delta.models.llama),
                (mlx_lm.models.bitnet, mlx_delta.models.bitnet),
            ):
                arguments = functools.partial(ours.ModelArgs, delta=setting)
                replace(theirs, Model=ours.Model, ModelArgs=arguments)
        yield


@functools.cache
def load_demo(setting: DeltaConfig | None) -> tuple[nn.Module, TokenizerWrapper]:
    """Load the demo model and its tokenizer, once for each setting."""
    path = find_model("demo")
    if setting is None:
        model, _ = mlx_lm.utils.load_model(path, model_config={"model_file": None})
        tokenizer = mlx_lm.utils.load_tokenizer(path)
    else:
        model, tokenizer = mlx_delta.load("demo", setting)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())  # what is still to be computed does not cross threads
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.has_chat_template = True
    return model, tokenizer


def _downloaded_models() -> SimpleNamespace:
    """A hub cache that holds one model, for the server to list."""
    names = ["config.json", "model.safetensors.index.json", "tokenizer_config.json"]
    files = [SimpleNamespace(file_path=Path(name)) for name in names]
    revision = SimpleNamespace(files=files)
    repo = SimpleNamespace(repo_type="model", repo_id="owner/model", refs={"main": revision})
    return SimpleNamespace(repos=[repo])
