"""What a checkpoint must hold: its config.json checked, and every tensor's name and shape.

Both follow from Hugging Face's Llama, BitNet and Gemma 3, whose names mlx-lm and mlx-swift-lm
use too:
https://github.com/huggingface/transformers/tree/main/src/transformers/models/llama
https://github.com/huggingface/transformers/tree/main/src/transformers/models/bitnet
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_delta.checkpoint.config import ROPE_NEEDED, check_rope

from .errors import ConvertError
from .gemma import MODEL_TYPE as GEMMA
from .gemma import Windows, old_spelling, read_windows

# The feed-forward's activation is part of the model's code, so config.json must not name another.
ACTIVATIONS = {
    "llama": "silu",
    "mistral": "silu",
    "bitnet": "relu2",
    GEMMA: "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, from a checked config.json."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    rope: dict[str, Any]
    windows: Windows | None = None

    def linears(self) -> dict[str, tuple[int, int]]:
        """Module paths of the layers' projections: (outputs, inputs)."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }
        return {
            f"model.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in shapes.items()
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, unquantized, in the order of a forward pass."""
        norms = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
        if self.model_type == "bitnet":
            norms |= {"self_attn.attn_sub_norm": self.hidden, "mlp.ffn_sub_norm": self.ffn}
        if self.windows:
            norms |= dict.fromkeys(
                ("pre_feedforward_layernorm", "post_feedforward_layernorm"), self.hidden
            )
            norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.head_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        linears = self.linears()
        for i in range(self.layers):
            prefix = f"model.layers.{i}."
            for path in (path for path in linears if path.startswith(prefix)):
                shapes[path + ".weight"] = linears[path]
                if self.mlp_bias if ".mlp." in path else self.attention_bias:
                    shapes[path + ".bias"] = linears[path][:1]
            shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def kv_bytes(self, context: int, bits: int) -> int:
        """Bytes of a dense key-value cache; 4- and 8-bit ones with groups of 64."""
        per_value = bits / 8 if bits == 16 else (bits + 32 / 64) / 8
        tokens = self.layers * context
        if self.windows:
            tokens = self.windows.cached_tokens(self.layers, context)
        return round(2 * self.kv_heads * self.head_dim * tokens * per_value)

    def entries(self) -> dict[str, Any]:
        """What loaders would otherwise take from defaults that differ, for config.json."""
        entries = {
            "head_dim": self.head_dim,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }
        rope = self.windows.entries(self.layers, self.rope) if self.windows else None
        return entries | (rope or rope_entries(self.rope))


def read_architecture(
    config: Mapping[str, Any], where: str, has_head: bool = False
) -> Architecture:
    """Check a config.json and read the model's shape.

    Args:
        config: The contents of config.json.
        where: What to call it in an error.
        has_head: Whether there is an output head among the weights; decides whether it is tied
            to the embedding where config.json does not say (versions of transformers differ).

    Raises:
        ConvertError: A value is missing, of the wrong type or out of range, or the model is of a
            kind that has no converter.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ACTIVATIONS:
        raise ConvertError(
            f"{where} has model_type {str(model_type)[:60]!r}; converters exist for "
            f"{', '.join(ACTIVATIONS)}. Try mlx_lm.convert."
        )
    activation = config.get("hidden_act") or ACTIVATIONS[model_type]
    if model_type == GEMMA:
        config = old_spelling(config, where)
        activation = config.get("hidden_activation") or activation
    if activation != ACTIVATIONS[model_type]:
        raise ConvertError(
            f"{where} has hidden_act {str(activation)[:60]!r}, but {model_type} models here "
            f"compute {ACTIVATIONS[model_type]!r}."
        )

    def whole(name: str, most: int, default: int | None = None) -> int:
        value = config.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConvertError(
                f"{where} must have {name} as a whole number from 1 to {most} but has "
                f"{str(value)[:60]!r}."
            )
        return value

    def flag(name: str, default: bool) -> bool:
        value = config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConvertError(f"{where} must have {name} true or false but has {value!r}.")
        return value

    hidden = whole("hidden_size", 1 << 17)
    heads = whole("num_attention_heads", 1 << 12)
    kv_heads = whole("num_key_value_heads", 1 << 12, default=heads)
    head_dim = whole("head_dim", 1 << 12, default=hidden // heads or 1)
    if config.get("head_dim") is None and hidden % heads:
        raise ConvertError(f"{where}: hidden_size {hidden} is not a multiple of {heads} heads.")
    if heads % kv_heads or head_dim % 2:
        raise ConvertError(
            f"{where}: {heads} heads, {kv_heads} kv heads and head_dim {head_dim} do not fit."
        )
    if model_type == "bitnet" and heads * head_dim != hidden:
        # attn_sub_norm runs over the joined heads and is as long as hidden_size.
        raise ConvertError(f"{where}: BitNet needs heads x head_dim ({heads * head_dim}) = hidden.")
    epsilon = config.get("rms_norm_eps")
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        raise ConvertError(f"{where} must have rms_norm_eps in (0, 1) but has {str(epsilon)[:60]}.")
    if config.get("num_experts") or config.get("num_local_experts"):
        raise ConvertError(f"{where} describes a mixture of experts; try mlx_lm.convert.")
    layers = whole("num_hidden_layers", 1 << 10)
    windows = read_windows(config, layers, where) if model_type == GEMMA else None
    types = config.get("layer_types")
    if types is not None and windows is None and types != ["full_attention"] * layers:
        raise ConvertError(
            f"{where} has layer_types other than full_attention; try mlx_lm.convert."
        )
    return Architecture(
        model_type=model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=whole("intermediate_size", 1 << 19),
        vocab=whole("vocab_size", 1 << 23),
        positions=whole("max_position_embeddings", 1 << 28, default=4096),
        tied=flag("tie_word_embeddings", not has_head),
        attention_bias=flag("attention_bias", False),
        mlp_bias=flag("mlp_bias", False),
        rope=read_rope(config, where),
        windows=windows,
    )


def read_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rope settings from either spelling, as one dictionary with ``rope_theta``.

    transformers 5 writes ``rope_parameters``; older versions ``rope_theta`` and ``rope_scaling``.
    mlx-lm's Llama reads the old names only and silently falls back to theta 10,000.

    Raises:
        ConvertError: The spellings disagree, or a value is missing or out of range.
    """
    old = config.get("rope_scaling") or {}
    new = config.get("rope_parameters") or {}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
            raise ConvertError(f"{where} has {name} {str(value)[:80]}: not one flat set of values.")
    merged: dict[str, Any] = {}
    for values in (old, new):
        values = {key: value for key, value in values.items() if value is not None}
        kind = values.pop("rope_type", None) or values.pop("type", None)
        values.pop("type", None)
        if kind is not None:
            values["rope_type"] = kind
        for key, value in values.items():
            if merged.setdefault(key, value) != value:
                raise ConvertError(
                    f"{where}: rope_scaling has {key} {str(merged[key])[:40]} but rope_parameters "
                    f"{str(value)[:40]}; correct one of them."
                )
    theta = config.get("rope_theta")
    if theta is not None and merged.setdefault("rope_theta", theta) != theta:
        raise ConvertError(
            f"{where}: rope_theta is {str(theta)[:40]} but rope_parameters has "
            f"{str(merged['rope_theta'])[:40]}; correct one of them."
        )
    merged.setdefault("rope_theta", 500000.0 if config.get("model_type") == "bitnet" else 10000.0)
    kind = merged.setdefault("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_NEEDED:
        raise ConvertError(
            f"{where} has rope type {str(kind)[:40]!r}; known: {', '.join(ROPE_NEEDED)}."
        )
    try:
        check_rope("rope", merged)
    except ValueError as error:  # as when a model is loaded
        raise ConvertError(f"{where}: {str(error).removeprefix('[load] ')}") from None
    return merged


def rope_entries(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings in both spellings, for config.json.

    ``rope_scaling`` names its type twice: older loaders, and Swift's BitNet, read ``type`` only.
    """
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if rope["rope_type"] == "default":
        old = None
    else:
        old = {"type": rope["rope_type"], **scaling}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": old,
        "rope_parameters": dict(rope),
    }
