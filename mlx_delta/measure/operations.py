"""Operations in the graph of a decoded token, counted and not timed."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Operations of MLX's that only look at a buffer in another way: no kernel runs for them.
VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes Copy ExpandDims Flatten Reshape Slice Split Squeeze "
    "StopGradient Transpose Unflatten View".split()
)


def count_operations(*outputs: Any) -> int:
    """Operations in the graph of arrays that are not evaluated yet; views are left out.

    MLX offers no count of kernel launches. On a GPU most operations are one launch each; MLX's CPU
    back end builds norms, RoPE and attention from several, so counts compare on one machine only.

    Args:
        *outputs: Arrays, or trees of them.
    """
    leaves: Any = tree_flatten(list(outputs))
    arrays = [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
    if not arrays:
        return 0
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    names = re.findall(r'\[label ="([^"]*)", shape=rectangle\]', graph.getvalue())
    return sum(name not in VIEWS for name in names)


def decode_operations(
    model: nn.Module, caches: list[Any], tokens: int, token: int = 0
) -> list[int]:
    """Operations of each of the next tokens, those that the caches need included.

    A token that finishes a block encodes it too. What is evaluated on the way, as when the length
    of what was stored decides where it goes, is counted before it is. What NumPy computes, where
    there is no GPU, is not counted.

    Args:
        model: From :func:`mlx_delta.load`.
        caches: One per layer; they grow by ``tokens``.
        tokens: How many to decode.
        token: Which one, each time.
    """
    counts = []
    for _ in range(tokens):
        with _counting() as evaluated:
            logits = model(mx.array([[token]]), cache=caches)
        state = [cache.state for cache in caches]
        counts.append(sum(evaluated) + count_operations(logits, state))
        mx.eval(logits, state)
    return counts


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Counts the operations of what is evaluated within, each graph as it is evaluated.

    By MLX's own functions, or because NumPy asks for the values.
    """
    counts: list[int] = []

    def counting(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*values: Any, **options: Any) -> Any:
            counts.append(count_operations(*values))
            return evaluate(*values, **options)

        return counted

    names = ((mx, "eval"), (mx, "async_eval"), (np, "array"), (np, "asarray"))
    with ExitStack() as stack:
        for module, name in names:
            stack.enter_context(patch.object(module, name, counting(getattr(module, name))))
        yield counts
