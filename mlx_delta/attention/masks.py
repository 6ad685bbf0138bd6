"""Which of its columns a query sees: masks that depend on positions only.

They are the same in every layer, so those of the last update are kept until another one comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlx_delta.cache.step import Step


def once_per_step(step: Step, name: Any, make: Callable[[], mx.array]) -> mx.array:
    """What ``make`` gives for a step, made once for all layers.

    Args:
        step: Of one layer; only its positions matter.
        name: Which of the step's masks.
        make: Makes it.
    """
    kept = _of_one_step(_places(step))
    if name not in kept:
        kept[name] = make()
    return kept[name]


def begin(step: Step) -> None:
    """Let go of the masks of another step: those of a long prompt are large."""
    _of_one_step(_places(step))


def _places(step: Step) -> tuple[Any, ...]:
    # By thread: an array that is not evaluated yet belongs to the thread that made it.
    places = (step.starts, step.steps, step.block_sizes, step.window_blocks)
    return (*places, threading.get_ident())


@lru_cache(maxsize=1)
def _of_one_step(places: tuple[Any, ...]) -> dict[Any, mx.array]:
    return {}


def positions(step: Step, first: int, end: int) -> mx.array:
    """Positions of queries ``first`` to ``end``: [C, 1], or [B, 1, C, 1] where rows differ."""
    steps = mx.arange(first, end)[:, None]
    if len(set(step.starts)) == 1:
        return steps + step.starts[0]
    return steps + mx.array(step.starts)[:, None, None, None]


def causal(position: mx.array, column: mx.array) -> mx.array:
    """Keys up to the query's own position; key 0 for padding queries, which have none."""
    return column <= mx.maximum(position, 0)


def plain_mask(step: Step, mask: mx.array | str | None) -> mx.array | str | None:
    """The mask for attending to keys whose index is their position."""
    if isinstance(mask, mx.array):
        return mask
    if len(set(step.starts)) == 1 and step.starts[0] >= 0:
        return "causal" if step.steps > 1 else None
    return once_per_step(
        step, "plain", lambda: causal(positions(step, 0, step.steps), mx.arange(step.length))
    )


def chunk_columns(
    step: Step, first: int, end: int, held_end: int, full: tuple[int, int], is_causal: bool
) -> mx.array:
    """What queries ``first`` to ``end`` see of ``[held keys ; full keys]``, boolean.

    Args:
        step: What they belong to.
        first: The first of the queries.
        end: After the last of them.
        held_end: Position after the last held column; the first one is 0.
        full: Positions of the first full column and after the last one.
        is_causal: Whether to hide keys after the query as well.
    """

    def make() -> mx.array:
        window = step.window_blocks
        size: int | mx.array | None = step.block_size
        if size is None:
            size = mx.array(step.block_sizes)[:, None, None, None]
        position = positions(step, first, end)
        boundary = (position // size - window) * size  # first position seen with its full key
        held_column, full_column = mx.arange(held_end), mx.arange(*full)
        use_held, use_full = held_column < boundary, full_column >= boundary
        if is_causal:
            use_full = use_full & causal(position, full_column)
        return mx.concatenate([use_held, use_full], axis=-1)

    return once_per_step(step, (first, end, is_causal), make)
