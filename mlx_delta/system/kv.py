"""``--kv small|balanced|exact``: settings that were measured, by a short name."""

from __future__ import annotations

from typing import Any

from mlx_delta.wording import nearest

# Bytes and KL divergence from dense attention on SmolLM2-135M-Instruct: docs/results.md.
KV: dict[str, dict[str, Any]] = {
    "small": {
        "key_format": "codes",
        "key_bits": 3,
        "value_bits": 3,
    },
    "balanced": {
        "key_format": "codes",
        "key_bits": 4,
        "value_bits": 4,
    },
    "exact": {
        "key_format": "held",
        "key_bits": None,
        "value_bits": None,
        "level": 0.0,
    },
}
SMALLER = ("balanced", "small")  # than dense caches; the larger first
HELP = (
    "How keys and values far from the query are kept: balanced or small as codes, with more bits "
    "where the model minds errors; exact as they are."
)


def advice() -> str:
    """The smaller kinds with what they take, for messages: grids and scales add half a bit."""
    bits = (f"--kv {name} ({KV[name]['key_bits'] + 0.5:g} bits a number)" for name in SMALLER)
    return " or ".join(bits)


def kv_fields(name: str) -> dict[str, Any]:
    """The fields of a setting that a name stands for.

    Raises:
        ValueError: There is no such name.
    """
    if name not in KV:
        raise ValueError(
            f"[kv] unknown kind {name!r}{nearest(name, KV)}; known are {', '.join(KV)}."
        )
    return dict(KV[name])
