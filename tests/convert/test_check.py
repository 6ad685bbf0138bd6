"""The rules of mlx-swift-lm's loader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_delta.convert.check import check_directory

from . import checkpoints as made
from .conftest import load_weights


@pytest.fixture
def good(run, tmp_path) -> Path:
    output, _ = run(made.write_llama(tmp_path / "m", made.LLAMA3))
    assert check_directory(output) == []
    return output


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    file = folder / name
    values = json.loads(file.read_text())
    for key, value in changes.items():
        if value is KeyError:
            del values[key]
        else:
            values[key] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"model_type": "iquestcoder"}, "model_type 'iquestcoder' is not one of"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"num_key_value_heads": 2.5}, "num_key_value_heads must be a whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number"),
        ({"rope_theta": None}, "rope_theta would silently be 10000"),
        ({"rope_scaling": {"type": "llama3"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "has the type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": [2]}}, "not a number or a string"),
        ({"quantization": {"group_size": None, "bits": 4}}, "lacks group_size as a whole number"),
        (
            {"quantization": {"group_size": 64, "bits": 4, "made_by": "us"}},
            "quantization has 'made_by', which needs whole numbers",
        ),
        (
            {"quantization": {"group_size": 64, "bits": 4, "model.norm": {"bits": 4}}},
            "quantization has 'model.norm', which needs whole numbers",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "does not have the shape of 4 bits"),
        ({"quantization": KeyError}, "has scales but config.json no quantization"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"eos_token_id": ["2"]}, "eos_token_id must be a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_found(changes, problem, good):
    edit(good, **changes)
    problems = check_directory(good)
    assert any(problem in found for found in problems), problems


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_or_broken_file_is_found(name, good):
    (good / name).write_text("{")
    assert "not valid JSON" in check_directory(good)[0]
    (good / name).unlink()
    assert "does not exist" in check_directory(good)[0]


def test_tokenizers_that_swift_does_not_know_are_found(good):
    edit(good, "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    assert "tokenizer_class 'TokenizersBackend' is not known" in check_directory(good)[0]
    edit(good, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit(good, "tokenizer.json", model={"type": "Unigram"})
    assert "'Unigram' instead of BPE" in check_directory(good)[0]


def test_weights_elsewhere_or_too_many_are_found(good):
    arrays = load_weights(good)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    mx.save_safetensors(str(good / "model.safetensors"), arrays)
    assert check_directory(good) == ["lm_head.weight belongs to no layer"]
    (good / "model.safetensors").rename(good / "weights.bin")
    assert "no model*.safetensors at its top level" in check_directory(good)[0]


def test_a_bitnet_needs_scales_of_the_norms_type(run, tmp_path):
    output, _ = run(made.write_packed(tmp_path / "m"))
    assert check_directory(output) == []
    arrays = load_weights(output)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    arrays[name] = arrays[name].astype(mx.float32)
    mx.save_safetensors(str(output / "model.safetensors"), arrays)
    assert check_directory(output) == [f"{name} is F32 but the norms are BF16"]
    edit(output, rope_scaling={"type": "llama3", "factor": 8})
    assert "has the type 'llama3'" in check_directory(output)[0]


def test_the_command(good):
    command = [sys.executable, "-m", "mlx_delta.convert", "check", good]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == f"{good}: ok"
    edit(good, hidden_size="64")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert json.loads(done.stdout)[str(good)] == ["hidden_size must be a whole number"]
