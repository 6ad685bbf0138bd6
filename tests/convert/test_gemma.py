"""Gemma 3: from GGUF and from safetensors, against a forward pass in NumPy."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_delta.convert.architecture import read_architecture
from mlx_delta.convert.errors import ConvertError
from mlx_delta.convert.sources import SourceOptions, open_source
from mlx_delta.convert.verify import verify

from . import checkpoints as made
from .conftest import FLOAT

TOKENS = list(range(20, 60))  # more than the window of 16


def gguf_metadata(**changes) -> dict:
    found = made.gguf_metadata(made.GEMMA, "gemma3") | {
        "gemma3.attention.sliding_window": made.GEMMA["sliding_window"],
        "gemma3.attention.sliding_window_pattern": made.GEMMA["sliding_window_pattern"],
        "tokenizer.ggml.add_space_prefix": False,
    }
    del found["gemma3.rope.dimension_count"]  # as in the real files
    return {key: value for key, value in (found | changes).items() if value is not None}


def write(file, **changes):
    return made.write_gguf(
        file, made.GEMMA, "F32", arch="gemma3", embedding="F32", metadata=gguf_metadata(**changes)
    )


def forward(config: dict, w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Logits [L, vocabulary] from Gemma's definition, in float64."""
    heads, d, eps = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]
    count = len(tokens)
    w = {name: values.astype(np.float64) for name, values in w.items()}
    away = np.arange(count)[:, None] - np.arange(count)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1 + w[name + ".weight"])

    def rotate(x, theta):
        angles = np.arange(count)[:, None] * theta ** (-np.arange(0, d, 2) / d)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    embedding = w["model.embed_tokens.weight"]
    x = embedding[tokens] * config["hidden_size"] ** 0.5
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        full = (i + 1) % config["sliding_window_pattern"] == 0
        theta = config["rope_theta"] if full else config["rope_local_base_freq"]
        seen = (away >= 0) & (full | (away < config["sliding_window"]))
        h = norm(x, p + "input_layernorm")
        q, k, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).reshape(count, -1, d) for n in "qkv")
        q = rotate(norm(q, p + "self_attn.q_norm"), theta)
        k = rotate(norm(k, p + "self_attn.k_norm"), theta)
        repeats = heads // k.shape[1]
        scores = np.einsum("ihd,jhd->hij", q, k.repeat(repeats, 1))
        scores = np.where(seen, scores * config["query_pre_attn_scalar"] ** -0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hij,jhd->ihd", weights, v.repeat(repeats, 1)).reshape(count, -1)
        out = out @ w[p + "self_attn.o_proj.weight"].T
        x = x + norm(out, p + "post_attention_layernorm")
        h = norm(x, p + "pre_feedforward_layernorm")
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        gate = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        out = (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        x = x + norm(out, p + "post_feedforward_layernorm")
    return norm(x, "model.norm") @ embedding.T


def logits(folder) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


@pytest.mark.parametrize("source", ["gguf", "safetensors"])
def test_the_result_computes_in_stock_mlx_lm_what_numpy_does(source, run, tmp_path):
    values = made.weights(made.GEMMA)
    # In the file a query is scaled by the head's length, which is what the files leave out.
    config = made.GEMMA | {"query_pre_attn_scalar": made.GEMMA["head_dim"]}
    if source == "gguf":
        given = write(tmp_path / "m.gguf")
    else:
        given = made.write_llama(tmp_path / "m", config, dtype="F32")
    output, _ = run(given, FLOAT)
    expected = forward(config, values, TOKENS)
    # mlx-lm rounds the embedding's factor, the root of 64, to bfloat16: exact here.
    np.testing.assert_allclose(logits(output), expected, atol=2e-4)
    # The window counts: without it the last logits are others.
    wide = forward(config | {"sliding_window": 100}, values, TOKENS)
    assert np.abs(expected[-1] - wide[-1]).max() > 1e-2


def test_config_json_names_the_settings_in_every_spelling(run, tmp_path):
    output, _ = run(write(tmp_path / "m.gguf"), FLOAT)
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and config["delta"]["threshold_mode"] == "optimal"
    assert config["query_pre_attn_scalar"] == 32 and config["sliding_window"] == 16
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config["rope_theta"] == 1e6 and config["rope_local_base_freq"] == 1e4
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_local_base_freq")}
    del new["sliding_window_pattern"]
    arch = read_architecture(new, "config.json")
    assert arch.rope["rope_theta"] == 1e6 and arch.windows.local_theta == 1e4
    assert arch.windows.pattern == 2


def test_the_comparison_runs_with_windows(run, tmp_path):
    source = write(tmp_path / "m.gguf")
    output, _ = run(source, FLOAT)
    found = verify(open_source(str(source), SourceOptions(), tokenizer=False), output)
    assert found["wrong"] == [] and found["kl"] < 1e-6 and found["top1_agreement"] == 1


def test_norms_come_back_to_the_bit(run, tmp_path):
    output, _ = run(write(tmp_path / "m.gguf"), FLOAT)
    from .conftest import load_weights

    name = "model.layers.1.self_attn.q_norm.weight"
    expected = made.weights(made.GEMMA)[name]
    np.testing.assert_allclose(np.array(load_weights(output)[name]), expected, atol=2e-7)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gemma3.attention.sliding_window": None}, "sliding_window as a whole number"),
        ({"gemma3.attention.sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"gemma3.attention.sliding_window_pattern": 9}, "from 1 to 3 but has '9'"),
        ({"gemma3.final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"gemma3.rope.freq_base_swa": 0.0}, "rope_local_base_freq > 0"),
    ],
    ids=["no window", "no pattern", "no layer that sees all", "softcap", "no base"],
)
def test_what_mlx_lm_does_not_compute_is_refused(changes, message, tmp_path):
    with pytest.raises(ConvertError, match=message.replace("(", r"\(")):
        open_source(str(write(tmp_path / "m.gguf", **changes)), SourceOptions())


def test_caches_of_windows_stay_short():
    arch = read_architecture(made.GEMMA, "config.json")
    # One layer of three sees everything.
    assert arch.kv_bytes(1000, 16) == 2 * 2 * 32 * (1000 + 2 * 16) * 2
