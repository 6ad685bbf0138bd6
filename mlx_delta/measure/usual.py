"""The setting of somebody who names none: the model's own, or smaller where it costs no time."""

from __future__ import annotations

from typing import Any

from mlx_delta.config import DeltaConfig
from mlx_delta.loading import MODEL_SETTING, find_model, read_config, read_setting
from mlx_delta.method.values import VALUE_GROUP
from mlx_delta.ops.backend import has_kernels
from mlx_delta.ops.storage import HEAD_DIMS
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.system.kv import kv_fields
from mlx_delta.system.tuning import NOISE, Shape, read_tuning, store_name, tables_count

KIND = "balanced"
_NAMES = ("num_attention_heads", "num_key_value_heads", "head_dim")


def usual_setting(model: str) -> tuple[Any, str]:
    """The setting where nothing was asked for, and what to say of it.

    ``--kv balanced`` where this machine's table of measurements says that it is as fast as dense
    attention, the model is calibrated (so that it also errs as little), and its config.json does
    not itself say how keys and values are stored; else what the model's own is.

    Args:
        model: As :func:`mlx_delta.load` takes it.

    Returns:
        What ``load`` takes as ``delta``, and a sentence; empty where there was nothing to choose.
    """
    if not has_kernels() or not tables_count():
        return MODEL_SETTING, ""
    path = find_model(model)
    config = read_config(path)
    own = read_setting(path, config)
    if own is None or not isinstance(own.sensitivities, Sensitivities):
        return MODEL_SETTING, ""
    if own.key_bits is not None or own.value_bits is not None:
        return MODEL_SETTING, ""
    try:
        coded = own.changed(**kv_fields(KIND))
    except ValueError:  # blocks of which no codes are made
        return MODEL_SETTING, ""
    shape = stated_shape(config, coded)
    if shape is not None and (shape.head_dim not in HEAD_DIMS or shape.head_dim % VALUE_GROUP):
        return MODEL_SETTING, ""
    most = None if shape is None else read_tuning().times_dense(shape)
    full = "keys and values are kept in full"
    if most is None:
        return MODEL_SETTING, (
            f"{full}; `python -m mlx_delta.benchmark --tune --model {model}` measures whether "
            f"--kv {KIND} is as fast here, and is then taken."
        )
    if most > NOISE:
        return MODEL_SETTING, (
            f"{full}: --kv {KIND} takes up to {most:.2f} times dense attention's time here."
        )
    return coded, (
        f"keys and values are kept as --kv {KIND}, which takes at most {most:.2f} times dense "
        "attention's time here; --kv exact keeps them in full."
    )


def stated_shape(config: dict[str, Any], setting: DeltaConfig) -> Shape | None:
    """What the table would know a model's layers by, as its file states them."""
    config = config.get("text_config") or config
    heads, kv_heads, head_dim = (config.get(name) for name in _NAMES)
    if not isinstance(heads, int) or heads < 1:
        return None
    if head_dim is None and isinstance(config.get("hidden_size"), int):
        head_dim = config["hidden_size"] // heads
    if not isinstance(head_dim, int):
        return None
    return Shape(store_name(setting), heads, kv_heads or heads, head_dim)
