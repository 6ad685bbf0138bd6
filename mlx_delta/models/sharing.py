"""A model of which each of several processes has a share: of the heads, or of the layers.

mlx-lm's ``shard`` splits the weights of a layer, ``pipeline`` the layers. A cache is then made of
what its process computes; here the setting follows, which may say something of each head or layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .anatomy import NotHanded, trace_heads
from .common import model_setting
from .parts import share_of_heads


def share(model: nn.Module, tensor_group: Any, pipeline_group: Any) -> None:
    """Leave a process its share of a model whose weights are not read yet.

    Args:
        model: From mlx-lm's ``load_model``, lazily.
        tensor_group: The processes that share the heads of every layer.
        pipeline_group: Those that share the layers.

    Raises:
        ValueError: The model can't be shared so; mlx-lm says which can.
    """
    name = getattr(model, "model_type", None) or type(model).__name__
    if tensor_group is not None and pipeline_group is not None:
        raise ValueError("[load] give tensor_group or pipeline_group, not both.")
    if tensor_group is not None:
        if not hasattr(model, "shard"):
            raise ValueError(f"[load] mlx-lm can't split the heads of a {name}.")
        model.shard(tensor_group)
    if pipeline_group is not None:
        inner = getattr(model, "model", None)
        if not hasattr(inner, "pipeline"):
            raise ValueError(f"[load] mlx-lm can't run the layers of a {name} in a pipeline.")
        layers, size = len(model.layers), pipeline_group.size()
        if layers < size:
            raise ValueError(
                f"[load] the model has {layers} layers, which are no pipeline of {size} processes."
            )
        inner.pipeline(pipeline_group)  # type: ignore[union-attr]


def share_heads(model: nn.Module, shard: Callable[[Any], None], group: Any = None) -> None:
    """Run mlx-lm's ``shard`` on a model, and give it the setting of its share of the heads.

    Args:
        model: With the delta.
        shard: The method of its own class.
        group: Of the processes; all of them when not given.

    Raises:
        ValueError: The weights can't be split over so many; nothing is changed then, but for
            layers that could.
    """
    group = group or mx.distributed.init()
    size, delta = group.size(), model_setting(model)
    if any(True for _ in getattr(model, "ternary_layers", tuple)()):
        raise ValueError("[load] a model with ternary layers can't be split over processes.")
    try:
        heads = [found.kv_heads for found in trace_heads(model) if found is not None]
    except NotHanded:  # of a dense model, whose setting says nothing of heads
        heads = []
    uneven = next((count for count in heads if count % size), None)
    if uneven is not None:
        raise ValueError(
            f"[load] the model's layers have {uneven} kv heads, which can't be split over {size} "
            f"processes; let each have layers of its own (--pipeline), or start fewer of them."
        )
    try:
        shard(group)
    except ValueError as error:
        raise ValueError(f"[load] can't be split over {size} processes: {error}.") from error
    if delta is not None and size > 1:
        model.args.delta = share_of_heads(delta, group.rank(), size)
