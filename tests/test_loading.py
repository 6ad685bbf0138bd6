"""Loading: real layouts load, and whatever is wrong is named before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama as stock_llama
from mlx_lm.utils import load_model as stock_load_model

from mlx_delta import DeltaConfig, load
from mlx_delta.loading import BUNDLED, find_model
from mlx_delta.models import bitnet, llama
from mlx_delta.system.devices import has_gpu
from tests.tiny import (
    LLAMA,
    SMALL,
    llama_model,
    tokens,
    write_bitnet,
    write_checkpoint,
    write_llama,
)


@pytest.fixture
def checkpoint(tmp_path):
    return write_llama(tmp_path / "model")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_gives_the_logits_of_its_weights(tmp_path, shards):
    path = write_llama(tmp_path / "model", shards)
    model, tokenizer = load(path, SMALL)
    ids = tokens(100)
    np.testing.assert_allclose(model(ids), llama_model(SMALL)(ids), atol=1e-5)
    assert tokenizer.decode(tokenizer.encode("Anna")).endswith("Anna")


def test_the_setting_is_the_callers_then_the_models_then_the_default(tmp_path):
    path = write_llama(tmp_path / "model")
    default = load(path)[0].args.delta  # with what its queries look at
    assert default.changed(sensitivities=None) == DeltaConfig()
    assert load(path, None)[0].args.delta is None
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "delta": SMALL.to_dict()}))
    assert load(path)[0].args.delta == SMALL
    assert load(path, DeltaConfig.paper())[0].args.delta == DeltaConfig.paper()
    (path / "config.json").write_text(json.dumps({**config, "delta": None}))
    assert load(path)[0].args.delta is None


def test_the_configuration_is_returned_on_request(checkpoint):
    *_, config = load(checkpoint, SMALL, return_config=True)
    assert config["vocab_size"] == LLAMA["vocab_size"]
    json.dumps(config)


def test_the_bundled_demo_loads_by_its_name():
    model, tokenizer = load()
    assert find_model("demo") == BUNDLED / "demo"
    assert isinstance(model, llama.Model) and model.args.delta is not None
    assert tokenizer.decode(tokenizer.encode("It was night.")).endswith("It was night.")


@pytest.mark.skipif(has_gpu(), reason="with a GPU models keep their own type")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["fp16", "bf16"])
def test_without_a_gpu_models_run_in_float32(tmp_path, dtype):
    weights = {k: v.astype(dtype) for k, v in tree_flatten(llama_model(None).parameters())}
    model, _ = load(write_checkpoint(tmp_path / "model", LLAMA, weights))
    assert {w.dtype for _, w in tree_flatten(model.parameters())} == {mx.float32}


def test_dense_loading_is_mlx_lms_own(checkpoint):
    model, _ = load(checkpoint, None)
    stock, _ = stock_load_model(checkpoint)
    assert isinstance(stock, stock_llama.Model)
    # Longer prompts go through attention by blocks where there is no GPU: equal to rounding.
    assert mx.array_equal(model(tokens(20)), stock(tokens(20)))
    assert mx.allclose(model(tokens(50)), stock(tokens(50)), atol=1e-3)


def test_a_packed_bitnet_checkpoint_loads(tmp_path):
    model, _ = load(write_bitnet(tmp_path / "model"), SMALL)
    assert isinstance(model, bitnet.Model)
    whole, caches = model(tokens(60)), model.make_cache()
    first = model(tokens(60)[:, :40], cache=caches)
    rest = model(tokens(60)[:, 40:], cache=caches)
    np.testing.assert_allclose(mx.concatenate([first, rest], axis=1), whole, atol=2e-3)


def test_a_quantized_checkpoint_loads(tmp_path):
    import mlx.nn as nn

    model = llama_model(SMALL, hidden_size=64, intermediate_size=64)
    nn.quantize(model, group_size=64, bits=4)
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 64}
    config["quantization"] = {"group_size": 64, "bits": 4}
    weights = dict(tree_flatten(model.parameters()))
    loaded, _ = load(write_checkpoint(tmp_path / "model", config, weights), SMALL)
    np.testing.assert_allclose(loaded(tokens(100)), model(tokens(100)), atol=1e-3)


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 500)


def _header(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"x" + file.read_bytes()[9:])


def _config(**changes):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_truncate, ValueError, r"model\.safetensors has \d+ bytes but its header announces"),
        (_garbage, ValueError, "is truncated or not a safetensors file"),
        (_header, ValueError, "has a broken safetensors header"),
        (lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, "has no weights"),
        (lambda p: (p / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), ValueError, "is not valid JSON"),
        (lambda p: (p / "config.json").write_text("[]"), ValueError, "must hold a JSON object"),
        (_config(model_type="gemma5"), ValueError, "Model type gemma5 not supported"),
        (_config(model_type="deepseek_v3"), ValueError, "'deepseek_v3' caches latents"),
        (_config(delta={"threshold": -1}), ValueError, "threshold must be >= 0 but got -1"),
        (_config(delta={"treshold": 1}), ValueError, "unknown setting 'treshold'"),
        (_config(delta={"threshold": [1, 2]}), ValueError, "2 values but the model has 3 layers"),
        (_config(num_hidden_layers=4), ValueError, r"model\.layers\.3\."),
        (_config(num_attention_heads=None), ValueError, "config.json"),
    ],
    ids=[
        "truncated", "garbage", "broken header", "no weights", "no config", "broken config",
        "config is a list", "another kind", "latents", "negative threshold", "unknown setting",
        "thresholds for other layers", "missing weights", "incomplete config",
    ],
)  # fmt: skip
def test_a_damaged_model_is_refused(checkpoint, damage, error, message):
    damage(checkpoint)
    with pytest.raises(error, match=message):
        load(checkpoint)


def test_a_missing_shard_is_named(tmp_path):
    path = write_llama(tmp_path / "model", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks model-00002-of-00003\.safetensors \(1 of 3"
    ):
        load(path)


def test_a_broken_index_is_refused(tmp_path):
    path = write_llama(tmp_path / "model", shards=2)
    (path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="is not a valid index"):
        load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", r"no model directory 'no-such-model'; .* bundled model \(demo"),
        ("./nowhere/model", "no model directory './nowhere/model'"),
        ("", "name is empty"),
    ],
)
def test_an_unknown_model_is_named(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load(name)


def test_a_hub_name_that_can_not_be_fetched(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("mlx_delta.checkpoint.find._download", refuse)
    with pytest.raises(FileNotFoundError, match="'owner/name' is neither .* no route to host"):
        load("owner/name")


def test_a_hub_name_is_fetched(monkeypatch, checkpoint):
    asked = []
    monkeypatch.setattr(
        "mlx_delta.checkpoint.find._download",
        lambda name, revision: asked.append(name) or checkpoint,
    )
    load("owner/name", SMALL)
    assert asked == ["owner/name"]


def test_weights_larger_than_the_free_memory_are_refused(monkeypatch, checkpoint):
    monkeypatch.setattr(
        "mlx_delta.checkpoint.weights.free_memory", lambda: (1000, "this machine's memory")
    )
    with pytest.raises(MemoryError, match=r"take \d+ MB but this machine's memory leaves 0 MB"):
        load(checkpoint)


def test_a_file_is_not_a_model(checkpoint):
    with pytest.raises(FileNotFoundError, match="is a file; give the directory"):
        load(checkpoint / "config.json")


def test_a_gguf_is_sent_to_the_converter(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for given in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(FileNotFoundError, match=r"convert it: python -m mlx_delta\.convert"):
            load(given)


def test_parts_of_a_gguf_are_to_be_merged(tmp_path):
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    for given in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        with pytest.raises(FileNotFoundError, match=r"several parts; merge them"):
            load(given)


def test_a_shard_missing_without_an_index_is_named(tmp_path):
    path = write_llama(tmp_path / "model", shards=3)
    (path / "model.safetensors.index.json").unlink()
    assert load(path, SMALL)
    (path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00003-of-00003\.safetensors"):
        load(path)


@pytest.mark.parametrize("spelling", ["absent", "false"])
def test_a_head_in_the_weights_is_used_unless_tied(tmp_path, spelling):
    head = mx.array(np.random.default_rng(9).normal(size=(4096, 32)).astype(np.float32))
    weights = {**dict(tree_flatten(llama_model(None).parameters())), "lm_head.weight": head}
    config = {**LLAMA, "tie_word_embeddings": False}
    if spelling == "absent":
        del config["tie_word_embeddings"]
    for setting in (SMALL, None):
        model, _ = load(write_checkpoint(tmp_path / "model", config, weights), setting)
        assert mx.array_equal(model.lm_head.weight, head)
    config["tie_word_embeddings"] = True
    assert "lm_head" not in load(write_checkpoint(tmp_path / "model", config, weights), SMALL)[0]


def test_without_a_head_the_embedding_is_the_head(tmp_path):
    config = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
    weights = dict(tree_flatten(llama_model(None).parameters()))
    model, _ = load(write_checkpoint(tmp_path / "model", config, weights), SMALL)
    np.testing.assert_allclose(model(tokens(30)), llama_model(SMALL)(tokens(30)), atol=1e-5)


def test_the_setting_may_be_a_dict(checkpoint):
    assert load(checkpoint, SMALL.to_dict())[0].args.delta == SMALL


@pytest.mark.parametrize("delta", ["demo", 3, True, [1.0], 0.5], ids=str)
def test_a_setting_of_another_type_is_refused(checkpoint, delta):
    with pytest.raises(ValueError, match=r"\[load\] delta must be a DeltaConfig, a dict of its"):
        load(checkpoint, delta)


def test_no_argument_beside_the_flag_lets_a_tokenizer_run_code(checkpoint):
    with pytest.raises(ValueError, match="must not hold trust_remote_code"):
        load(checkpoint, tokenizer_config={"trust_remote_code": True})


def test_a_files_flag_lets_nothing_run(checkpoint):
    """A tokenizer that asks for code of its own: without the flag it is refused or ignored."""
    (checkpoint / "evil.py").write_text("open('ran', 'w').close()\nclass Evil: pass\n")
    _edit(checkpoint / "config.json", trust_remote_code=True, model_file="evil.py")
    auto_map = {"AutoTokenizer": [None, "evil.Evil"]}
    _edit(checkpoint / "tokenizer_config.json", trust_remote_code=True, auto_map=auto_map)
    for setting in (SMALL, None):
        try:
            load(checkpoint, setting)
        except ValueError as error:
            assert "\n" not in str(error)
    assert not (checkpoint / "ran").exists() and not Path("ran").exists()


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    weights = dict(tree_flatten(llama_model(None).parameters()))
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    path = write_checkpoint(tmp_path / "model", LLAMA, weights)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that"
    ):
        load(path)


def test_weights_of_integers_are_refused(tmp_path):
    weights = dict(tree_flatten(llama_model(None).parameters()))
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.int32)
    path = write_checkpoint(tmp_path / "model", LLAMA, weights)
    with pytest.raises(ValueError, match=r"model\.norm\.weight must be floating point but is"):
        load(path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    path = write_llama(tmp_path / "model", vocab_size=4000)
    with pytest.raises(ValueError, match=r"pieces up to 4095 but the model's embedding has 4000"):
        load(path)


def _edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
