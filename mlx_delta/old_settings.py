"""Settings as earlier versions wrote them, in forms that are gone.

Before there were formats, ``key_bits`` of 16, 8, 4, 3 or 2 packed held keys: a mask of what
changed, and the changed values in 16 bits or as codes of one width. ``value_bits`` of 8 or 4 stored
values in mlx-lm's quantized form.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

OLD_KEY_BITS = (16, 8, 4, 3, 2)
OLD_VALUE_BITS = (8, 4)
MOST_LANE_BITS = 7  # of held keys whose values are codes

_said: dict[Any, Any] = {}


def has_packed_keys(values: Mapping[str, Any]) -> bool:
    """Whether the fields of a setting ask for packed keys."""
    bits = values.get("key_bits")
    return values.get("key_format", "held") == "held" and _is_one_of(bits, OLD_KEY_BITS)


def has_quantized_values(values: Mapping[str, Any]) -> bool:
    """Whether they ask for values in mlx-lm's quantized form."""
    bits = values.get("value_bits")
    return values.get("value_format", "plain") == "plain" and _is_one_of(bits, OLD_VALUE_BITS)


def modern_fields(values: Mapping[str, Any], cuts_runs: bool) -> dict[str, Any]:
    """The same fields in forms that there are, with a warning that says which.

    Packed keys become held ones whose values are codes where runs are cut, and stay in full where
    a threshold holds them. Quantized values become rotated ones beside those, and else 16 bits.

    Args:
        values: Fields and values of a :class:`mlx_delta.DeltaConfig`.
        cuts_runs: Whether its mode is one that cuts runs.
    """
    fields, said = dict(values), []
    if has_packed_keys(values):
        bits = values["key_bits"]
        if cuts_runs and bits < 16:
            fields |= {"key_format": "deltas", "key_bits": min(bits, MOST_LANE_BITS)}
            said.append(f"key_bits={bits} is key_format='deltas' of {fields['key_bits']} bits")
        else:
            fields["key_bits"] = None
            said.append(f"keys of key_bits={bits} are kept in full")
    if has_quantized_values(values):
        bits = values["value_bits"]
        fields["value_bits"] = 16 if fields.get("key_bits") is None else bits
        new = "16 bits" if fields["value_bits"] == 16 else "rotated"
        said.append(f"values of value_bits={bits} are {new}")
    if said:
        say(f"[DeltaConfig] a setting as it was before formats: {', '.join(said)}.")
    return fields


def say(text: str) -> None:
    """Warn of something once, in a line: of whoever called, nothing would be of use."""
    warnings.warn_explicit(text, UserWarning, "mlx_delta", 1, registry=_said)


def _is_one_of(value: Any, known: tuple[int, ...]) -> bool:
    return type(value) is int and value in known
