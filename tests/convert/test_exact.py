"""What must be exact: formats with a counterpart in MLX, codes, and logits before quantizing."""

import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

import mlx_delta
from mlx_delta.convert.errors import ConvertError
from mlx_delta.convert.gguf_blocks import affine_rows, i2s_codes, ternary_rows
from mlx_delta.convert.plan import Options
from mlx_delta.convert.sources import SourceOptions, open_source
from mlx_delta.convert.weights import dequantize_affine, dequantize_ternary
from mlx_delta.ternary.codes import pack_words

from . import checkpoints as made
from .conftest import FLOAT, dequantized, load_weights

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
WIDE = made.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
WIDE_BITNET = made.BITNET | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
EXACT = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "TQ1_0", "TQ2_0"]


def logits(folder: Path, activation_bits: int | None = None) -> np.ndarray:
    config = {"activation_bits": activation_bits}
    model, _ = mlx_delta.load(folder, delta=None, model_config=config)
    return np.array(model(mx.array(GOLDEN["tokens"]))[:, -8:])


@pytest.mark.parametrize("name", ["llama", "llama3", "llama_linear", "bitnet", "ternary_llama"])
def test_logits_equal_those_of_transformers(name, run, tmp_path):
    config = {
        "llama": made.LLAMA,
        "llama3": made.LLAMA3,
        "llama_linear": made.LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "bitnet": made.BITNET,
        "ternary_llama": made.TERNARY_LLAMA,
    }[name]
    write = made.write_packed if "quantization_config" in config else made.write_llama
    output, report = run(write(tmp_path / "source", config), FLOAT)
    assert report["totals"]["changed"] == 0
    np.testing.assert_allclose(logits(output), GOLDEN[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["bitnet", "ternary_llama"])
def test_logits_with_int8_activations_equal_those_of_transformers(name, run, tmp_path):
    config = {"bitnet": made.BITNET, "ternary_llama": made.TERNARY_LLAMA}[name]
    output, _ = run(made.write_packed(tmp_path / "source", config), FLOAT)
    assert json.loads((output / "config.json").read_text())["activation_bits"] == 8
    np.testing.assert_allclose(logits(output, 8), GOLDEN[name + "_a8"], rtol=2e-4, atol=2e-5)


def test_new_rope_spelling_gives_the_same_logits_and_both_are_written(run, tmp_path):
    old = {k: v for k, v in made.LLAMA3.items() if not k.startswith("rope")}
    config = old | {"rope_parameters": {"rope_theta": 500000.0, **made.LLAMA3_ROPE}}
    output, _ = run(made.write_llama(tmp_path / "source", config), FLOAT)
    np.testing.assert_allclose(logits(output), GOLDEN["llama3"], rtol=2e-4, atol=2e-5)
    written = json.loads((output / "config.json").read_text())
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"]["type"] == written["rope_scaling"]["rope_type"] == "llama3"
    assert written["rope_parameters"]["factor"] == 32.0


@pytest.mark.parametrize("ternary", ["packed", "affine"])
def test_both_ternary_layouts_of_bitnet_give_the_same_logits(ternary, run, tmp_path):
    options = Options(bits=None, embed_bits=None, dtype="F32", ternary=ternary)
    output, _ = run(made.write_packed(tmp_path / "source"), options)
    np.testing.assert_allclose(logits(output), GOLDEN["bitnet"], rtol=2e-4, atol=2e-5)


def test_full_precision_bitnet_gives_the_bytes_of_the_packed_one(run, tmp_path):
    packed, _ = run(made.write_packed(tmp_path / "packed"), name="a")
    master, _ = run(made.write_llama(tmp_path / "master", made.MASTER), name="b")
    old, new = load_weights(packed), load_weights(master)
    assert set(old) == set(new)
    assert all(mx.array_equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_the_scale_multiplies_or_divides(linear_class, run, tmp_path):
    quantization = made.BITNET["quantization_config"] | {"linear_class": linear_class}
    config = made.BITNET | {"quantization_config": quantization}
    output, _ = run(made.write_packed(tmp_path / "source", config), FLOAT)
    # The two store a scale and its inverse, each rounded to bfloat16.
    np.testing.assert_allclose(logits(output), GOLDEN["bitnet"], atol=0.05)


def expected_gguf(values: np.ndarray, kind: str) -> np.ndarray:
    """A matrix after a stay in a GGUF type, read by the gguf package."""
    data = np.frombuffer(made.encode_gguf(values, kind), dtype=np.uint8)
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    return gguf.quants.dequantize(data.reshape(len(values), -1, size), type_).reshape(values.shape)


@pytest.mark.parametrize("kind", EXACT)
def test_gguf_types_are_kept_bit_for_bit(kind, run, tmp_path):
    source = made.write_gguf(tmp_path / "m.gguf", WIDE, kind)
    is_float = kind in ("F32", "F16", "BF16")
    output, report = run(source, Options(bits=None, embed_bits=None, dtype="F32"))
    config = json.loads((output / "config.json").read_text())
    for name, values in made.weights(WIDE).items():
        if made.is_linear(name):
            found = np.array(dequantized(output, name, config))
            # The file has q and k in llama.cpp's order; types act on rows, so order is free.
            np.testing.assert_array_equal(found, expected_gguf(values, kind))
    assert ("quantization" in config) != is_float
    assert report["totals"]["changed"] == 0


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "TQ2_0"])
def test_exact_types_stay_exact_in_the_default_setting(kind, run, tmp_path):
    output, report = run(made.write_gguf(tmp_path / "m.gguf", WIDE, kind))
    config = json.loads((output / "config.json").read_text())
    changed = {t["name"] for t in report["tensors"] if t["error"]["largest"]}
    assert not any(made.is_linear(name) for name in changed)
    name = "model.layers.1.mlp.down_proj.weight"
    found = np.array(dequantized(output, name, config))
    np.testing.assert_array_equal(found, expected_gguf(made.weights(WIDE)[name], kind))


def test_i2s_is_kept_bit_for_bit(run, tmp_path):
    source = made.write_gguf(tmp_path / "m.gguf", WIDE_BITNET, "I2_S", arch="bitnet-b1.58")
    options = Options(bits=None, embed_bits=None, dtype="F32", ternary="affine")
    output, _ = run(source, options)
    config = json.loads((output / "config.json").read_text())
    for name, values in made.weights(WIDE_BITNET).items():
        if made.is_linear(name):
            codes, scale = made.ternary(values)
            found = np.array(dequantized(output, name, config))
            np.testing.assert_array_equal(found, codes * scale)


def test_i2s_made_on_arm_reads_with_its_own_layout():
    codes = np.random.RandomState(0).randint(0, 3, (4, 256))
    data = np.frombuffer(made.encode_i2s(codes, np.float32(1), lanes=16), dtype=np.uint8)[:-32]
    np.testing.assert_array_equal(i2s_codes(data, 256, "arm", "t"), codes)
    assert not np.array_equal(i2s_codes(data, 256, "x86", "t"), codes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_any_block_reads_as_the_gguf_package_reads_it(kind):
    # Every byte pattern, not only what a quantizer writes; the scales finite.
    state = np.random.RandomState(1)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = state.randint(0, 256, (8, 16 * size)).astype(np.uint8)
    blocks = data.reshape(8, 16, size)
    blocks[..., :2] = state.standard_normal((8, 16, 1)).astype("<f2").view(np.uint8)
    blocks[..., 2:4] = state.standard_normal((8, 16, 1)).astype("<f2").view(np.uint8)
    rows = affine_rows(data, kind, "t")
    bits = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}[kind]
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(np.array(dequantize_affine(rows, 32, bits)), expected)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_blocks_read_as_the_gguf_package_reads_them(kind):
    values = np.random.RandomState(2).randint(-1, 2, (8, 1024)).astype(np.float32) * 0.5
    type_ = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(values, type_)
    found = np.array(dequantize_ternary(ternary_rows(data, kind, "t")))
    np.testing.assert_array_equal(found, gguf.quants.dequantize(data, type_))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_ternary_codes_in_mlx_quantization_are_exact(dtype):
    codes = np.random.RandomState(3).randint(0, 3, (16, 256)).astype(np.uint8)
    scale = mx.array([0.0371]).astype(made.TYPES[dtype])
    scales = mx.broadcast_to(scale, (16, 2))
    found = mx.dequantize(pack_words(mx.array(codes)), scales, -scales, 128, 2)
    expected = mx.array(codes.astype(np.float32) - 1).astype(scale.dtype) * scale
    assert mx.array_equal(found, expected)


def test_code_3_is_refused(run, tmp_path):
    arrays = made.packed_weights(made.BITNET)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = arrays[name] | 0xC0
    source = made.write_hf(tmp_path / "source", made.BITNET, arrays)
    with pytest.raises(ConvertError, match=f"tensor {name} holds the ternary code 3"):
        run(source)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_factors_of_a_gguf_file_become_the_settings_they_came_from(theta, run, tmp_path):
    # As llama.cpp's converter computes them (generate_extra_tensors), here for 64 dims.
    base, factors = theta, []
    for i in range(0, 64, 2):
        wavelength = 2 * np.pi * base ** (i / 64)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    source = made.write_gguf(
        tmp_path / "m.gguf",
        WIDE | {"rope_theta": theta},
        extra={"rope_freqs.weight": np.array(factors, dtype=np.float32)},
    )
    output, _ = run(source)
    rope = json.loads((output / "config.json").read_text())["rope_parameters"]
    expected = made.LLAMA3_ROPE | {"factor": 8.0, "rope_theta": theta}
    assert rope == expected


def test_gguf_and_safetensors_of_one_model_give_the_same_logits(run, tmp_path):
    a, _ = run(made.write_llama(tmp_path / "hf", WIDE, "F16"), FLOAT, name="a")
    b, _ = run(made.write_gguf(tmp_path / "m.gguf", WIDE, "F16"), FLOAT, name="b")
    np.testing.assert_array_equal(logits(a), logits(b))


def test_ordinary_weights_are_quantized_as_mlx_lm_does(run, tmp_path):
    from mlx_lm import convert

    source = made.write_llama(tmp_path / "source")
    convert(str(source), str(tmp_path / "stock"), quantize=True, q_bits=4, q_group_size=64)
    output, _ = run(source, Options(bits=4, group_size=64, embed_bits=4))
    old, new = load_weights(tmp_path / "stock"), load_weights(output)
    assert set(old) == set(new)
    assert all(mx.array_equal(old[name], new[name]) for name in old)


def test_a_quantized_mlx_lm_directory_is_kept_bit_for_bit(run, tmp_path):
    first, _ = run(made.write_llama(tmp_path / "source"), name="first")
    again, report = run(first, name="again", shim=True)
    old, new = load_weights(first), load_weights(again)
    assert set(old) == set(new) and all(mx.array_equal(old[n], new[n]) for n in old)
    assert report["source"]["format"] == "mlx" and report["totals"]["changed"] == 0
    assert (again / "delta_model.py").is_file()


@pytest.mark.parametrize(
    "scaling, expected",
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({}, None),
    ],
    ids=["type and factor", "factor", "the name of 2023", "none", "one", "nothing"],
)
def test_linear_rope_scaling_in_every_spelling_of_gguf(scaling, expected, run, tmp_path):
    metadata = made.gguf_metadata(made.LLAMA, "llama")
    metadata |= {f"llama.{key}": value for key, value in scaling.items()}
    output, _ = run(made.write_gguf(tmp_path / "m.gguf", metadata=metadata))
    found = json.loads((output / "config.json").read_text())["rope_scaling"]
    assert (found and found["factor"]) == expected


def test_rope_scaling_with_more_than_config_json_can_say_is_refused(tmp_path):
    metadata = made.gguf_metadata(made.LLAMA, "llama")
    metadata |= {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 0.5}
    with pytest.raises(ConvertError, match="attn_factor, which is not supported"):
        open_source(str(made.write_gguf(tmp_path / "m.gguf", metadata=metadata)), SourceOptions())
