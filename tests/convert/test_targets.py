"""Every source for every target, and that the result loads where the table says it does."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

import mlx_delta
from mlx_delta.convert.check import check_directory
from mlx_delta.convert.errors import ConvertError
from mlx_delta.convert.plan import Options
from mlx_delta.convert.targets import TARGETS, assess, parse_memory
from mlx_delta.models import llama

from . import checkpoints as made

WIDE = made.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
WIDE_BITNET = made.BITNET | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def mlx_directory(folder: Path) -> Path:
    from mlx_lm import convert

    convert(str(made.write_llama(folder / "float")), str(folder / "mlx"), quantize=True)
    return folder / "mlx"


def sentencepiece_directory(folder: Path) -> Path:
    from .test_tokenizers import train

    made.write_llama(folder / "spm", tokenizer=False)
    (folder / "spm" / "tokenizer.model").write_bytes(train(folder, vocab=384))
    return folder / "spm"


# Source: how to make one, and whether unmodified mlx-lm runs the result without Metal (its BitNet
# layers are Metal kernels; it loads them everywhere).
SOURCES = {
    "Llama safetensors": (lambda f: made.write_llama(f / "m"), True),
    "sharded Llama 3": (lambda f: made.write_llama(f / "m", made.LLAMA3, shards=3), True),
    "packed BitNet": (lambda f: made.write_packed(f / "m"), False),
    "full-precision BitNet": (lambda f: made.write_llama(f / "m", made.MASTER), False),
    "ternary Llama": (lambda f: made.write_packed(f / "m", made.TERNARY_LLAMA), True),
    "GGUF F16": (lambda f: made.write_gguf(f / "m.gguf"), True),
    "GGUF Q4_0": (lambda f: made.write_gguf(f / "m.gguf", WIDE, "Q4_0"), True),
    "GGUF Q4_K": (lambda f: made.write_gguf(f / "m.gguf", WIDE, "Q4_K", embedding="Q6_K"), True),
    "GGUF TQ2_0": (lambda f: made.write_gguf(f / "m.gguf", WIDE, "TQ2_0"), True),
    "GGUF I2_S BitNet": (
        lambda f: made.write_gguf(f / "m.gguf", WIDE_BITNET, "I2_S", arch="bitnet-b1.58"),
        False,
    ),
    "mlx-lm directory": (mlx_directory, True),
    "sentencepiece only": (sentencepiece_directory, True),
}


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("source", list(SOURCES))
def test_the_result_loads(source, target, run, tmp_path):
    make, runs_stock = SOURCES[source]
    preset = TARGETS[target]
    options = Options(bits=preset.bits, group_size=preset.group_size, embed_bits=preset.embed_bits)
    output, _ = run(make(tmp_path), options, target=target)
    assert check_directory(output) == []
    tokens = mx.array([[5, 6, 7, 8]])
    model, tokenizer = mlx_delta.load(output)
    logits = model(tokens)
    assert bool(mx.isfinite(logits).all()) and logits.shape == (1, 4, 384)
    assert tokenizer.decode(tokenizer.encode("the word", add_special_tokens=False)) == "the word"
    stock, _ = load_model(output, lazy=True)
    if runs_stock:
        # mlx-lm leaves the activations of ternary layers alone.
        dense, _ = mlx_delta.load(output, delta=None, model_config={"activation_bits": None})
        stock.set_dtype(mx.float32)
        dense.set_dtype(mx.float32)
        assert mx.allclose(stock(tokens), dense(tokens), atol=1e-4)


def test_bitnet_in_mlx_quantization_loads_here_only(run, tmp_path):
    output, _ = run(made.write_packed(tmp_path / "m"), Options(ternary="affine"))
    model, _ = mlx_delta.load(output)
    assert bool(mx.isfinite(model(mx.array([[1, 2, 3]]))).all())
    with pytest.raises(ValueError):
        load_model(output, lazy=True)
    assert "must be packed" in check_directory(output)[0]
    with pytest.raises(ConvertError, match="ipads could not load the result"):
        run(tmp_path / "m", Options(ternary="affine"), name="b", target="ipad")


def test_the_shim_gives_unmodified_mlx_lm_the_delta(run, tmp_path):
    output, _ = run(made.write_llama(tmp_path / "m"), shim=True, delta={"threshold": 0.5})
    stock, _ = load_model(output, trust_remote_code=True)
    assert type(stock).__mro__[0].__module__ == llama.__name__
    assert [type(cache).__name__ for cache in stock.make_cache()] == ["DeltaKVCache"] * 2
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(output)
    assert json.loads((output / "config.json").read_text())["delta"]["threshold"] == 0.5


@pytest.mark.parametrize("shim", ["bitnet", "llama", "bitnet_llama"])
def test_the_shim_names_the_right_model(shim, run, tmp_path):
    output, _ = run(
        {
            "bitnet": lambda: made.write_packed(tmp_path / "m"),
            "llama": lambda: made.write_llama(tmp_path / "m"),
            "bitnet_llama": lambda: made.write_packed(tmp_path / "m", made.TERNARY_LLAMA),
        }[shim](),
        shim=True,
    )
    assert f"from mlx_delta.models import {shim}\n" in (output / "delta_model.py").read_text()
    load_model(output, lazy=True, trust_remote_code=True)


def test_the_shim_reads_the_sensitivities_beside_it(run):
    output, _ = run("demo", Options(dtype="F32"), shim=True)
    assert (output / "delta_sensitivities.safetensors").is_file()
    model, _ = load_model(output, lazy=True, trust_remote_code=True)
    assert not isinstance(model.args.delta.sensitivities, str | None)
    assert len(model.make_cache()) == len(model.layers)


def test_a_converted_demo_generates_with_the_delta_here_and_in_mlx_lm(run, tmp_path):
    delta = {"block_size": 16, "window": 16}
    # float32: half-precision products of quantized weights are slow on a CPU.
    output, _ = run("demo", Options(dtype="F32"), shim=True, delta=delta, context=512)
    prompt = "Once upon a time there was a little girl who lived in a house near the woods. " * 6
    ours = subprocess.run(
        [sys.executable, "-m", "mlx_delta.generate", "--model", output, "--prompt", prompt,
         "--max-tokens", "8"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr
    assert "Sparsity:" in ours.stdout
    # mlx-lm's own command; what it makes its cache with only reports the class of it.
    code = (
        "import importlib\n"
        "g = importlib.import_module('mlx_lm.generate'); make = g.make_prompt_cache\n"
        "def look(*a, **k):\n"
        "    found = make(*a, **k); print('CACHE', type(found[0]).__name__); return found\n"
        "g.make_prompt_cache = look\n"
        "g.main()"
    )
    stock = subprocess.run(
        [sys.executable, "-c", code, "--model", output, "--trust-remote-code", "--prompt", prompt,
         "--max-tokens", "8"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert stock.returncode == 0, stock.stderr
    assert "CACHE DeltaKVCache" in stock.stdout and "Generation: 8 tokens" in stock.stdout


def test_whether_it_fits_and_what_would():
    from mlx_delta.convert.architecture import read_architecture

    llama_8b = read_architecture(
        made.LLAMA
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        "config.json",
    )
    assert llama_8b.kv_bytes(1, 16) == 128 * 1024  # as published: 128 KiB a token
    assert assess(llama_8b, 4_500_000_000, "mac", 16, 8192, 16).verdict == "yes"
    assert assess(llama_8b, 4_500_000_000, "iphone", 6, 4096, 8).verdict == "no"
    tight = assess(llama_8b, 4_500_000_000, "ipad", 8, 4096, 8)
    assert tight.verdict == "tight" and "increased-memory entitlement" in tight.text
    less = assess(llama_8b, 6_000_000_000, "mac", 16, 131072, 16)
    assert less.verdict == "no" and "would fit: --max-context" in less.text


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "8TB"])
def test_a_memory_size_that_is_none_is_refused(text):
    with pytest.raises(ConvertError, match="--device-memory must look like 8GB"):
        parse_memory(text)
