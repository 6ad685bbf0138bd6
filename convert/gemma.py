"""What sets Gemma 3 apart: layers with a sliding window, two rope bases, scaled queries.

Names and defaults: Gemma3TextConfig in
https://github.com/huggingface/transformers/tree/main/src/transformers/models/gemma3, and
mlx_lm/models/gemma3_text.py, which computes only windows in a fixed pattern.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConvertError

MODEL_TYPE = "gemma3_text"
FULL, SLIDING = "full_attention", "sliding_attention"
THETA, LOCAL_THETA = 1000000.0, 10000.0
UNSUPPORTED = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")


@dataclass(frozen=True)
class Windows:
    """Which layers see how much, and the settings that go with it.

    Attributes:
        size: Tokens that a layer with a window sees, the present one included.
        pattern: Every so manyth layer sees everything.
        local_theta: Rope base of the layers with a window.
        query_scalar: Queries are divided by its square root.
    """

    size: int
    pattern: int
    local_theta: float
    query_scalar: float

    def is_full(self, layer: int) -> bool:
        """Whether a layer sees everything."""
        return (layer + 1) % self.pattern == 0

    def kinds(self, layers: int) -> list[str]:
        """config.json's ``layer_types``."""
        return [FULL if self.is_full(i) else SLIDING for i in range(layers)]

    def cached_tokens(self, layers: int, context: int) -> int:
        """Keys that all layers' caches hold together."""
        full = layers // self.pattern
        return full * context + (layers - full) * min(context, self.size)

    def entries(self, layers: int, rope: Mapping[str, Any]) -> dict[str, Any]:
        """Their entries of config.json, in the spellings of all versions.

        Args:
            layers: The model's layers.
            rope: Settings of the layers that see everything, with ``rope_theta``.
        """
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        local = {"rope_type": "default", "rope_theta": self.local_theta}
        return {
            "rope_theta": rope["rope_theta"],
            "rope_local_base_freq": self.local_theta,
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "rope_parameters": {FULL: dict(rope), SLIDING: local},
            "layer_types": self.kinds(layers),
            "sliding_window": self.size,
            "sliding_window_pattern": self.pattern,
            "query_pre_attn_scalar": self.query_scalar,
        }


def read_windows(config: Mapping[str, Any], layers: int, where: str) -> Windows:
    """Check what only Gemma 3 has.

    Raises:
        ConvertError: A value is missing or out of range, or asks for what mlx-lm does not compute.
    """
    for name in UNSUPPORTED:
        if config.get(name):
            raise ConvertError(f"{where} has {name} {str(config[name])[:40]}; not supported.")
    kinds = config.get("layer_types")
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    if pattern is None and isinstance(kinds, list) and FULL in kinds:
        pattern = kinds.index(FULL) + 1
    windows = Windows(
        _whole("sliding_window", config.get("sliding_window"), 1 << 20, where),
        # mlx-lm asks the first layer that sees everything for its cache: there must be one.
        _whole("sliding_window_pattern", 6 if pattern is None else pattern, layers, where),
        _positive("rope_local_base_freq", config.get("rope_local_base_freq", LOCAL_THETA), where),
        _positive("query_pre_attn_scalar", config.get("query_pre_attn_scalar", 256), where),
    )
    if kinds is not None and kinds != windows.kinds(layers):
        raise ConvertError(
            f"{where} has layer_types that are not in a fixed pattern; mlx-lm computes only those."
        )
    return windows


def old_spelling(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json whose rope settings of the two kinds of layers are apart.

    transformers 5 writes them as two entries of ``rope_parameters``.

    Raises:
        ConvertError: The entries are no objects.
    """
    config = dict(config)
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and (FULL in nested or SLIDING in nested):
        full, local = nested.get(FULL) or {}, nested.get(SLIDING) or {}
        if not isinstance(full, dict) or not isinstance(local, dict):
            raise ConvertError(f"{where} has rope_parameters {str(nested)[:80]}: not two objects.")
        if local.get("rope_type", "default") != "default":
            raise ConvertError(f"{where} scales the rope of layers with windows; not supported.")
        config["rope_parameters"] = full
        if local.get("rope_theta") is not None:
            config["rope_local_base_freq"] = local["rope_theta"]
    if config.get("rope_theta") is None and not (config.get("rope_parameters") or {}):
        config["rope_theta"] = THETA
    return config


def _whole(name: str, value: Any, most: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConvertError(
            f"{where} must have {name} as a whole number from 1 to {most} but has "
            f"{str(value)[:60]!r}."
        )
    return value


def _positive(name: str, value: Any, where: str) -> float:
    good = not isinstance(value, bool) and isinstance(value, (int, float))
    if not good or not 0 < value < math.inf:
        raise ConvertError(f"{where} must have {name} > 0 but has {str(value)[:40]!r}.")
    return value
