"""``--kv small|balanced|exact``: settings that were measured, by a short name."""

from __future__ import annotations

from typing import Any

from mlx_delta.config import DeltaConfig
from mlx_delta.notation import read_fields
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
    """The smaller kinds with what they take, for messages.

    Grids of keys add half a bit, and scales of values an eighth.
    """
    own = {name: (KV[name]["key_bits"] + 0.5 + KV[name]["value_bits"] + 0.125) for name in SMALLER}
    bits = (f"--kv {name} ({both / 2:.1f} bits a number)" for name, both in own.items())
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


def written_fields(text: str) -> dict[str, Any]:
    """The fields that ``kv=small,sinks=0`` names: any of :class:`DeltaConfig`, and a short name.

    Raises:
        ValueError: A field or name is unknown, lacks a value, or two of them give the same field.
    """
    parts = text.split(",") if text.strip() else []
    kinds = [part for part in parts if part.partition("=")[0].strip() == "kv"]
    fields = read_fields(",".join(part for part in parts if part not in kinds), DeltaConfig)
    if len(kinds) > 1:
        raise ValueError("[DeltaConfig] kv is given twice; drop one.")
    for part in kinds:
        for name, value in kv_fields(part.partition("=")[2].strip()).items():
            if name in fields:
                raise ValueError(f"{part.strip()} and {name} both give {name}; drop one.")
            fields[name] = value
    return fields


def check_holds(setting: DeltaConfig, wish: str) -> None:
    """Refuse a wish for how much is held, of a setting that holds nothing.

    Args:
        setting: What the wish is of.
        wish: As the user wrote it.

    Raises:
        ValueError: Its keys are codes.
    """
    if setting.key_format == "codes":
        raise ValueError(
            f"{wish} says how much is held, but of keys with key_format='codes' nothing is; drop "
            "it or --kv, or give --delta key_format=held where the model's own keys are codes."
        )
