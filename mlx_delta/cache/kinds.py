"""Which stores a setting asks for."""

from __future__ import annotations

from typing import Any

from mlx_delta.config import DeltaConfig

from .coded_keys import CodedKeys
from .delta_keys import DeltaKeys
from .dense_keys import DenseKeys
from .packed_keys import PackedKeys
from .turned_values import TurnedValues
from .values import ValueStore

Keys = DenseKeys | PackedKeys
Values = ValueStore | TurnedValues


def key_kind(config: DeltaConfig) -> Any:
    """The class of the store of a setting's keys."""
    if config.key_bits is None:
        return DenseKeys
    return {"codes": CodedKeys, "deltas": DeltaKeys}.get(config.key_format, PackedKeys)


def value_kind(config: DeltaConfig) -> Any:
    """The class of the store of a setting's values."""
    return TurnedValues if config.value_format == "rotated" else ValueStore
