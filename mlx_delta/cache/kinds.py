"""Which stores a setting asks for."""

from __future__ import annotations

from typing import Any

from mlx_delta.config import DeltaConfig

from .coded_keys import CodedKeys
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
    return CodedKeys if config.key_format == "codes" else PackedKeys


def value_kind(config: DeltaConfig) -> Any:
    """The class of the store of a setting's values."""
    return TurnedValues if config.value_format == "rotated" else ValueStore
