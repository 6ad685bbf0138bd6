"""Which stores a setting asks for."""

from __future__ import annotations

from typing import Any

from mlx_delta.config import DeltaConfig

from .coded_keys import CodedKeys
from .delta_keys import DeltaKeys
from .dense_keys import DenseKeys
from .far_keys import FarKeys
from .turned_values import TurnedValues
from .values import ValueStore

Keys = DenseKeys | FarKeys
Values = ValueStore | TurnedValues


def key_kind(config: DeltaConfig) -> Any:
    """The class of the store of a setting's keys."""
    return {"held": DenseKeys, "codes": CodedKeys, "deltas": DeltaKeys}[config.key_format]


def value_kind(config: DeltaConfig) -> Any:
    """The class of the store of a setting's values."""
    return TurnedValues if config.value_format == "rotated" else ValueStore
