"""A model's config.json: read, and its values checked before a model is built from them.

mlx-lm builds from whatever stands there: a negative number of heads, a rope base of 0 or 10**9
layers end in an obscure error, in wrong numbers, or not at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_file import read_json, shown

FILE = "config.json"

# What whole numbers may be; a model's sizes multiply, so they stay far below 2**31.
_SIZES = {
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1 << 14,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 40,
    "sliding_window": 1 << 40,
}
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "rope_traditional")
# Numbers > 0, and numbers >= 0.
_POSITIVE = ("rope_theta", "rope_local_base_freq")
_NOT_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
# Entries that a Llama or BitNet can't do without; other architectures name theirs themselves.
_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
# What a kind of rope can't do without.
ROPE_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}
_GROUP_SIZES = (16, 32, 64, 128)
_BITS = (2, 3, 4, 5, 6, 8)
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def read_config(path: Path) -> dict[str, Any]:
    """A model directory's config.json, as it stands there.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a JSON object.
    """
    if not (path / FILE).is_file():
        raise FileNotFoundError(f"[load] {path} has no {FILE}: not a model directory.")
    return read_json(path / FILE)


def check_config(config: Mapping[str, Any], is_ours: bool) -> None:
    """Refuse values that no model can be built from.

    Args:
        config: The entries of a config.json, and what replaces them.
        is_ours: Whether it is of a Llama or BitNet, whose entries are all known.

    Raises:
        ValueError: A value has another type or is out of range; the message names it.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _NAME.fullmatch(model_type):
        raise _wrong("model_type", "be a name", model_type)
    for name in _NEEDED if is_ours else ():
        if config.get(name) is None:
            raise ValueError(f"[load] {FILE} lacks {name}.")
    for name, most in _SIZES.items():
        _check_size(name, config.get(name), most, is_ours)
    for name in _FLAGS:
        value = config.get(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(name, "be true or false", value)
    for name in _POSITIVE + _NOT_NEGATIVE:
        value = config.get(name)
        least = "> 0" if name in _POSITIVE else ">= 0"
        if value is not None and (is_ours or _is_number(value)):
            if not _is_number(value) or value < 0 or (name in _POSITIVE and value == 0):
                raise _wrong(name, f"be a number {least}", value)
    for name in ("rope_scaling", "rope_parameters"):
        _check_rope(name, config.get(name), is_ours)
    for name in ("quantization", "quantization_config"):
        _check_quantization(name, config.get(name))
    _check_tokens("eos_token_id", config.get("eos_token_id"))
    if not isinstance(config.get("delta"), (Mapping, type(None))):
        raise _wrong("delta", "be an object or null", config["delta"])
    if is_ours:
        _check_heads(config)
        _check_layer_types(config)


def check_generation_config(path: Path) -> None:
    """Check the one entry of generation_config.json that mlx-lm takes.

    Raises:
        ValueError: The file is not a JSON object, or the entry no token ids.
    """
    file = path / "generation_config.json"
    if file.exists():
        _check_tokens("eos_token_id", read_json(file).get("eos_token_id"), file.name)


def _wrong(name: str, must: str, value: Any, file: str = FILE) -> ValueError:
    return ValueError(f"[load] {name} must {must} in {file} but got {shown(value)}.")


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 100


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(name: str, value: Any, most: int, is_ours: bool) -> None:
    """A whole number; other architectures may have one for each layer, or 0 for none."""
    if value is None or (not is_ours and isinstance(value, (list, dict, str))):
        return
    least = 1 if is_ours else 0
    if not _is_whole(value):
        raise _wrong(name, "be a whole number", value)
    if not least <= value <= most:
        raise _wrong(name, f"be from {least} to {most}", value)


def _check_rope(name: str, rope: Any, is_ours: bool) -> None:
    """The rope settings of one spelling, if there are any."""
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise _wrong(name, "be an object", rope)
    if is_ours:  # others may have a set for each kind of layer
        check_rope(name, rope)


def check_rope(name: str, rope: Mapping[str, Any]) -> None:
    """Check numbers that scale positions: finite, and > 0 where they divide.

    Args:
        name: What to call them.
        rope: One set of them.

    Raises:
        ValueError: One is missing, of another type or out of range; the message names it.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise _wrong(f"{name}.rope_type", "be a name", kind)
    for entry in ROPE_NEEDED.get(kind, ()):
        if rope.get(entry) is None:
            raise ValueError(f"[load] {name} of type {kind!r} lacks {entry} in {FILE}.")
    for entry, value in rope.items():
        where = f"{name}.{entry}"
        if entry in ("short_factor", "long_factor"):
            is_list = isinstance(value, list) and value
            if not is_list or not all(_is_number(x) and x > 0 for x in value):
                raise _wrong(where, "be a list of numbers > 0", value)
        elif entry.endswith(("factor", "theta", "embeddings", "beta_fast", "beta_slow")):
            if value is not None and (not _is_number(value) or value <= 0):
                raise _wrong(where, "be a number > 0", value)
        elif entry.startswith("mscale") or entry in ("attn_factor", "factor_scale"):
            if value is not None and not _is_number(value):
                raise _wrong(where, "be a number", value)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise _wrong(f"{name}.low_freq_factor", "be below high_freq_factor", rope)


def _check_quantization(name: str, found: Any) -> None:
    """mlx-lm's own quantization; what others write there is read by name only."""
    if found is None:
        return
    if not isinstance(found, Mapping):
        raise _wrong(name, "be an object", found)
    method = found.get("quant_method", "mlx" if name == "quantization" else None)
    if method is None and not {"bits", "group_size"} <= set(found):
        raise ValueError(f"[load] {name} has no quant_method in {FILE}.")
    if method is not None and not isinstance(method, str):
        raise _wrong(f"{name}.quant_method", "be a name", method)
    excluded = found.get("modules_to_not_convert")
    if excluded is not None and not (
        isinstance(excluded, list) and all(isinstance(x, str) for x in excluded)
    ):
        raise _wrong(f"{name}.modules_to_not_convert", "be a list of names", excluded)
    if "quant_method" in found and name != "quantization":
        return
    if name == "quantization":
        for entry in ("bits", "group_size"):
            if entry not in found:
                raise ValueError(f"[load] {name} lacks {entry} in {FILE}.")
    sets = [(name, found)]
    for layer, values in found.items():
        if isinstance(values, Mapping):
            sets.append((f"{name}.{shown(layer)}", values))
    for where, values in sets:
        for entry, known in (("bits", _BITS), ("group_size", _GROUP_SIZES), ("mode", _MODES)):
            value = values.get(entry)
            if entry in values and (isinstance(value, (bool, float)) or value not in known):
                choices = ", ".join(map(str, known))
                raise _wrong(f"{where}.{entry}", f"be one of {choices}", value)


def _check_tokens(name: str, value: Any, file: str = FILE) -> None:
    """One token id, or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_whole(x) and 0 <= x < 1 << 31 for x in ids):
        raise _wrong(name, "be a token id or a list of them", value, file)


def _check_heads(config: Mapping[str, Any]) -> None:
    """Heads of queries share those of keys evenly, and a head has an even size for rope."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise _wrong("num_key_value_heads", f"divide num_attention_heads ({heads})", kv_heads)
    head_dim = config.get("head_dim")
    if head_dim is None and hidden % heads:
        raise _wrong("num_attention_heads", f"divide hidden_size ({hidden})", heads)
    head_dim = hidden // heads if head_dim is None else head_dim
    if head_dim % 2:
        raise _wrong("head_dim", "be even", head_dim)


def _check_layer_types(config: Mapping[str, Any]) -> None:
    """One known name for each layer; windows need a size."""
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is None:
        return
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or not all(isinstance(x, str) and x in known for x in kinds):
        raise _wrong("layer_types", f"be a list of {' and '.join(known)}", kinds)
    if len(kinds) != layers:
        raise _wrong("layer_types", f"name {layers} layers", kinds)
    if "sliding_attention" in kinds and config.get("sliding_window") is None:
        raise ValueError(f"[load] sliding_window is missing in {FILE}: layer_types needs it.")
    if "full_attention" not in kinds:
        raise _wrong("layer_types", "have a full_attention layer", kinds)
