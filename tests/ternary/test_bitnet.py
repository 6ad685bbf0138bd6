"""BitNet: every layout gives transformers' logits, and what is broken is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_delta import DeltaConfig, load
from mlx_delta.measure.traffic import weight_bytes
from mlx_delta.models import bitnet
from mlx_delta.ternary import codes as ternary
from mlx_delta.ternary.linear import TernaryLinear, quantize_rows
from tests.bitnet_golden import checkpoints
from tests.tiny import SMALL, bitnet_model, byte_tokenizer, tokens, write_checkpoint

GOLDEN = np.load(Path(checkpoints.__file__).with_name("golden.npz"))
IDS = mx.array(checkpoints.tokens())
each_case = pytest.mark.parametrize("case", checkpoints.CASES)


def write(path: Path, case: str = "packed", edit: Any = None, **changes: Any) -> Path:
    """A checkpoint of the golden ones, its tensors perhaps edited."""
    config = checkpoints.CASES[case] | changes
    found = checkpoints.tensors(checkpoints.CASES[case])
    if edit is not None:
        edit(found)
    return with_tokenizer(checkpoints.write(path, config, found))


def with_tokenizer(path: Path) -> Path:
    """The same directory, with a tokenizer of bytes, for its 256 rows."""
    byte_tokenizer(path)
    return path


def save_affine(path: Path, model: Any, **config: Any) -> Path:
    """A model's weights as they are in memory: MLX's 2-bit quantization."""
    entry = {"group_size": 64, "bits": 4}
    for name, layer in model.ternary_layers():
        entry[name] = {"group_size": layer.group_size, "bits": 2}
    weights = dict(tree_flatten(model.parameters()))
    return write_checkpoint(path, {**config, "quantization": entry}, weights)


def close(actual: mx.array, expected: np.ndarray) -> None:
    """Equal but for float32's rounding, which adds up along the sums."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.array(actual) / scale, expected / scale, atol=2e-6)


# Parity with transformers.


@each_case
def test_logits_are_those_of_transformers(tmp_path, case):
    model, _ = load(write(tmp_path / "model", case), None)
    close(model(IDS)[0], GOLDEN[f"{case}/logits"])


@each_case
def test_each_layer_is_that_of_transformers(tmp_path, case):
    model, _ = load(write(tmp_path / "model", case), None)
    hidden = GOLDEN[f"{case}/hidden"]
    assert mx.array_equal(model.model.embed_tokens(IDS)[0], mx.array(hidden[0]))
    for i, layer in enumerate(model.layers):
        close(layer(mx.array(hidden[i])[None], mask="causal")[0], hidden[i + 1])


def test_codes_are_those_of_the_checkpoint_bit_for_bit(tmp_path):
    model, _ = load(write(tmp_path / "model"), None)
    packed = checkpoints.tensors(checkpoints.CASES["packed"])
    for path, layer in model.ternary_layers():
        codes = ternary.pack_rows(ternary.unpack_words(layer.weight))
        np.testing.assert_array_equal(codes, packed[f"{path}.weight"][1])


def test_masters_are_rounded_to_the_codes_of_transformers_bit_for_bit(tmp_path):
    model, _ = load(write(tmp_path / "model", "bf16"), None)
    for path, layer in model.ternary_layers():
        codes = ternary.pack_rows(ternary.unpack_words(layer.weight))
        np.testing.assert_array_equal(codes, GOLDEN[f"bf16/codes/{path}"])


# Layouts and types.


@each_case
def test_affine_directories_give_the_same_logits(tmp_path, case):
    model, _ = load(write(tmp_path / "source", case), None)
    config = {k: v for k, v in checkpoints.CASES[case].items() if k != "quantization_config"}
    path = save_affine(tmp_path / "affine", model, **config, activation_bits=8)
    again, _ = load(path, None)
    assert [layer.one_scale for _, layer in again.ternary_layers()] == [True] * 14
    assert mx.array_equal(again(IDS), model(IDS))
    # Unread, the scales may differ: the general path. Its sums are rounded in another order, which
    # int8 activations would magnify where one lies on the border between two integers.
    lazy, _ = load(path, None, lazy=True)
    for _, layer in [*again.ternary_layers(), *lazy.ternary_layers()]:
        layer.activation_bits = None
    assert not any(layer.one_scale for _, layer in lazy.ternary_layers())
    close(lazy(IDS)[0], np.array(again(IDS)[0]))


def test_scales_may_differ_between_groups():
    """As GGUF's TQ2_0 leaves them: a scale of zero where all weights are."""
    rng = np.random.default_rng(0)
    layer = TernaryLinear(256, 8, activation_bits=None)
    layer.weight = ternary.pack_words(mx.array(rng.integers(0, 3, (8, 256))))
    layer.scales = mx.array(rng.integers(0, 3, (8, 2)) / 4)
    layer.biases, layer.one_scale = -layer.scales, False
    x = mx.array(rng.normal(size=(3, 256)))
    weights = np.array(ternary.unpack_words(layer.weight)).astype(np.float32) - 1
    weights *= np.repeat(np.array(layer.scales), 128, axis=1)
    np.testing.assert_allclose(layer(x), np.array(x) @ weights.T, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("case", ["packed", "llama"])
def test_embedding_and_head_may_be_quantized(tmp_path, case, bits):
    model, _ = load(write(tmp_path / "source", case), None)
    nn.quantize(model, group_size=64, bits=bits)
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert type(model.layers[0].mlp.up_proj) is TernaryLinear
    config = {**checkpoints.CASES[case], "quantization": {"group_size": 64, "bits": bits}}
    # The layers stay in BitNet's own packing.
    packed = checkpoints.write(tmp_path / "x", {}, checkpoints.tensors(checkpoints.CASES[case]))
    weights = mx.load(str(packed / "model.safetensors"))
    ours = dict(tree_flatten(model.parameters()))
    weights |= {k: v for k, v in ours.items() if "layers" not in k}
    again, _ = load(write_checkpoint(tmp_path / "model", config, weights), None)
    # Loaded, the head is a product in float32 where there is no GPU: equal to rounding.
    assert mx.allclose(again(IDS), model(IDS), rtol=1e-5, atol=1e-3)
    error = np.abs(np.array(again(IDS)[0]) - GOLDEN[f"{case}/logits"]).max()
    assert 0 < error < 2 ** (5 - bits) * np.abs(GOLDEN[f"{case}/logits"]).max()


def test_reading_weights_twice_changes_nothing(tmp_path):
    path = write(tmp_path / "model")
    model = bitnet.Model(bitnet.ModelArgs.from_dict(checkpoints.CASES["packed"]))
    once = model.sanitize(mx.load(str(path / "model.safetensors")))
    twice = model.sanitize(once)
    assert set(once) == set(twice) and all(mx.array_equal(once[k], twice[k]) for k in once)


def test_float16_is_converted_or_refused(tmp_path, caplog, monkeypatch):
    def halve(found):
        for name, (dtype, array) in found.items():
            if dtype == "BF16":
                values = (array.astype(np.uint32) << 16).view(np.float32)
                found[name] = ("F16", values.astype(np.float16))

    model, _ = load(write(tmp_path / "model", edit=halve), None)
    assert "overflows float16: converted to mlx.core.float32" in caplog.text
    close(model(IDS)[0], GOLDEN["packed/logits"])
    with pytest.raises(ValueError, match="overflows float16; use bfloat16 or float32"):
        model.set_dtype(mx.float16)
    monkeypatch.setattr("mlx.core.default_device", lambda: mx.Device(mx.gpu))
    weights = model.sanitize(mx.load(str(tmp_path / "model" / "model.safetensors")))
    assert {w.dtype for w in weights.values()} == {mx.uint32, mx.bfloat16}


def test_bfloat16_stays_near(tmp_path):
    model, _ = load(write(tmp_path / "model"), None)
    model.set_dtype(mx.bfloat16)
    logits = model(IDS)
    assert logits.dtype == mx.bfloat16
    expected = GOLDEN["packed/logits"]
    error = np.abs(np.array(logits[0].astype(mx.float32)) - expected).mean()
    assert error < 0.05 * np.abs(expected).mean()


# Activations.


def test_activations_are_rounded_for_each_token():
    x = mx.array([[127.0, 0.5, 1.5, -2.5, 126.5], [0, 0, 0, 0, 0], [-254.0, 1, 3, 5, 253]])
    integers, step = quantize_rows(x)
    assert integers.tolist() == [[127, 0, 2, -2, 126], [0] * 5, [-127, 0, 2, 2, 126]]
    np.testing.assert_allclose(step[::2, 0], [1, 2])


def test_activation_quantization_can_be_switched_off(tmp_path):
    path = write(tmp_path / "model")
    on, off = (load(path, None, model_config={"activation_bits": b})[0](IDS) for b in (8, None))
    assert mx.array_equal(on, load(path, None)[0](IDS))
    difference = mx.abs(on - off).max() / mx.abs(on).max()
    assert 1e-3 < difference < 0.2
    config = checkpoints.CASES["packed"] | {"activation_bits": None}
    (path / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(off, load(path, None)[0](IDS))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "in chunks"])
def test_a_row_gets_the_same_bits_in_every_batch(monkeypatch, keep):
    monkeypatch.setattr("mlx_delta.ternary.linear.CHUNK", 5 * 352)
    rng = np.random.default_rng(0)
    layer = TernaryLinear(352, 12)
    layer.weight = ternary.pack_words(mx.array(rng.integers(0, 3, (12, 352))))
    layer.scales, layer.keep_values = layer.scales * 0.3, keep
    layer.eval()
    x = mx.array(rng.normal(size=(1, 30, 352)))
    whole = layer(x)
    for size in (1, 2, 5):
        parts = [layer(x[:, i : i + size]) for i in range(0, 30, size)]
        assert mx.array_equal(mx.concatenate(parts, axis=1), whole)
    integers, step = quantize_rows(x.reshape(-1, 352))
    sums = np.array(integers, np.int64) @ (np.array(ternary.unpack_words(layer.weight)) - 1.0).T
    np.testing.assert_allclose(whole.reshape(-1, 12), sums * step * 0.3, rtol=1e-6)


def test_kept_values_follow_the_weights():
    layer = TernaryLinear(32, 4)
    layer.keep_values = True
    layer.eval()
    x = mx.ones((1, 32))
    assert copy.deepcopy(layer)(x)[0, 0] == layer(x)[0, 0] == -32
    layer.weight = ternary.pack_words(mx.full((4, 32), 2))
    assert layer(x)[0, 0] == 32


def test_gradients_pass_the_rounding():
    layer = TernaryLinear(32, 4)
    gradient = mx.grad(lambda x: layer(x).sum())(mx.arange(32.0)[None])
    np.testing.assert_allclose(gradient, -4 * np.ones((1, 32)))


# The delta.


def test_bitnet_attends_with_the_delta():
    model, ids = bitnet_model(), tokens(200)
    whole, caches = model(ids), model.make_cache()
    parts = [model(ids[:, a:b], cache=caches) for a, b in ((0, 90), (90, 91), (91, 200))]
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), whole, atol=2e-3)
    dense = bitnet_model(None)(ids)
    assert not np.allclose(whole, dense, atol=0.05)
    zero = bitnet_model(DeltaConfig(**{**SMALL.to_dict(), "threshold": 0.0}))(ids)
    np.testing.assert_allclose(zero, dense, atol=2e-3)


def test_a_ternary_llama_attends_with_the_delta(tmp_path):
    model, _ = load(write(tmp_path / "model", "llama"), SMALL)
    ids = mx.array(checkpoints.tokens(80))
    whole, caches = model(ids), model.make_cache()
    parts = [model(ids[:, a:b], cache=caches) for a, b in ((0, 50), (50, 51), (51, 80))]
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), whole, atol=2e-3)
    dense, _ = load(tmp_path / "model", None)
    assert not np.allclose(whole, dense(ids), atol=0.05)


# What is read.


def test_bytes_of_a_decoded_token_of_the_2b_model(tmp_path, monkeypatch):
    # As on a GPU, where weights keep their own type.
    monkeypatch.setattr("mlx.core.default_device", lambda: mx.Device(mx.gpu))
    before = mx.get_active_memory()
    model, _ = load(with_tokenizer(checkpoints.write_2b(tmp_path / "model", True)), None, lazy=True)
    assert weight_bytes(model) == 706_580_900 <= 0.71e9
    assert weight_bytes(model, ternary_kernel=False) == 771_706_880 <= 0.78e9
    stock, _ = load(
        with_tokenizer(checkpoints.write_2b(tmp_path / "stock", False)), None, lazy=True
    )
    assert weight_bytes(stock) == pytest.approx(1.18e9, rel=0.005)
    assert mx.get_active_memory() - before < 1 << 20, "nothing was read"


def test_an_untied_head_is_read_instead_of_the_embedding(tmp_path):
    model, _ = load(write(tmp_path / "model", "llama"), None)
    head, width = model.lm_head.weight, model.model.embed_tokens.weight.shape[1]
    # Without a GPU all is in float32, and counted at 16 bits.
    ternary_bytes = sum(layer.weight.nbytes + 2 for _, layer in model.ternary_layers())
    norms, row = 5 * 128 * 2, 2 * width
    assert weight_bytes(model) == head.nbytes // 2 + ternary_bytes + norms + row


# What is refused.

UP = "model.layers.1.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"


def _put(name: str, dtype: str, change: Any) -> Any:
    return lambda found: found.update({name: (dtype, change(found[name][1]))})


def _without(name: str) -> Any:
    return lambda found: found.pop(name)


def _code_3(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[5, 7] |= 0x30
    return array


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_put(f"{UP}.weight", "U8", _code_3), f"tensor {UP}.weight holds the ternary code 3"),
        (_without(f"{Q}.weight_scale"), f"tensor {Q}.weight is packed but has no {Q}.weight_scale"),
        (_without(f"{UP}.weight"), f"tensor {UP}.weight is missing"),
        (_without("model.layers.1.mlp.ffn_sub_norm.weight"), "layers.1.mlp.ffn_sub_norm.weight"),
        (_put(f"{Q}.weight", "U8", lambda w: w[:-1]), f"{Q}.weight must have shape .32, 128."),
        (_put(f"{Q}.weight", "U8", lambda w: w[:, :-4]), f"{Q}.weight must have shape .32, 128."),
        (
            _put(f"{Q}.weight", "F32", lambda w: w.astype(np.float32)),
            f"{Q}.weight is not packed but has a {Q}.weight_scale",
        ),
        (_put(f"{Q}.weight", "I8", lambda w: w), f"{Q}.weight of type mlx.core.int8 has no"),
        (
            _put(f"{Q}.weight_scale", "F32", lambda w: np.array([np.inf], np.float32)),
            f"the scale of tensor {Q}.weight is not finite",
        ),
    ],
    ids=[
        "code 3", "no scale", "no weight", "no norm", "rows missing", "columns missing",
        "not packed", "another type", "infinite scale",
    ],
)  # fmt: skip
def test_a_broken_tensor_is_named(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "model", edit=edit), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            checkpoints.quantization(linear_class="trilinear"),
            "linear_class must be one of bitlinear, autobitlinear .* but got 'trilinear'",
        ),
        (checkpoints.quantization(use_rms_norm=True), "use_rms_norm .* is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "must be 'bitnet' but got 'gptq'"),
        ({"activation_bits": 4}, "activation_bits must be 8 or null .* but got 4"),
        ({"intermediate_size": 322}, "layers.0.mlp.gate_proj.weight: .* out_features of 4 but got"),
        ({"hidden_size": 120}, "self_attn.q_proj.weight: .* in_features must be a multiple of 32"),
    ],
    ids=["linear class", "inner norms", "method", "activations", "rows", "columns"],
)
def test_an_unknown_configuration_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "model", **changes), None)


def test_a_truncated_file_names_the_tensor(tmp_path):
    path = write(tmp_path / "model")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-70000])
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.down_proj.weight is cut off"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {f"{Q}.weight": w[f"{Q}.weight"] | 3}, f"{Q}.weight holds the ternary code 3"),
        (lambda w: {f"{Q}.biases": w[f"{Q}.biases"] * 1.5}, f"{Q}.biases is not minus the scales"),
        (lambda w: {f"{Q}.scales": w[f"{Q}.scales"][:, :0]}, f"{Q}.scales has shape"),
        (
            lambda w: {f"{Q}.weight": mx.concatenate([w[f"{Q}.weight"]] * 2, axis=1)},
            f"{Q}.weight must have shape .128, 8.",
        ),
        (
            lambda w: {f"{Q}.weight": w[f"{Q}.weight"].view(mx.int32)},
            f"{Q}.weight must be uint32 but is mlx.core.int32",
        ),
    ],
    ids=["code 3", "biases", "no groups", "4 bits", "type"],
)
def test_a_broken_affine_tensor_is_named(tmp_path, change, message):
    model, _ = load(write(tmp_path / "source"), None)
    config = {k: v for k, v in checkpoints.BITNET.items() if k != "quantization_config"}
    path = save_affine(tmp_path / "affine", model, **config)
    weights = mx.load(str(path / "model.safetensors"))
    mx.save_safetensors(str(path / "model.safetensors"), {**weights, **change(weights)})
    with pytest.raises(ValueError, match=message):
        load(path, None)
