"""Which model it is, by what it computes with: weights, configuration and setting, not its path."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_delta.config import DeltaConfig
from mlx_delta.sensitivities import Sensitivities

# Its number changes with how keys and values are stored: what an earlier version made of the same
# tokens would not be what is made now.
_FORMAT = b"mlx_delta model 3"
# Words that are summed up at once: what is in between takes little memory.
_PART = 1 << 22


def fingerprint(model: nn.Module, *others: Any) -> str:
    """A text that is the same for two models only if they give the same keys.

    Every bit of every weight counts, adapters and types included, and all numbers and names in the
    model's arguments, the setting of the delta among them. It is proof against mistakes, not
    against someone who makes weights for it.

    Args:
        model: Loaded.
        *others: What else makes a difference; by its ``repr``.
    """
    digest = hashlib.sha256(_FORMAT)
    parameters: Any = tree_flatten(model.parameters())
    for name, weight in sorted(parameters, key=lambda pair: pair[0]):
        sums = _sums(weight)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {sums}\n".encode())
    arguments = getattr(model, "args", None)
    values = vars(arguments) if hasattr(arguments, "__dict__") else {}
    for key in sorted(values):
        digest.update(f"{key}={_said(values[key])}\n".encode())
    for other in (type(model).__name__, *others):
        digest.update(f"{other!r}\n".encode())
    return digest.hexdigest()


def _said(value: Any) -> str:
    """A value as text; a setting whole, with its sensitivities.

    Sensitivities that were found while loading, and are in no file, depend in their last digits on
    how many threads there were: of these only the size.
    """
    if not isinstance(value, DeltaConfig):
        return repr(value)
    values = value.to_dict(whole=True)
    found = value.sensitivities
    if isinstance(found, Sensitivities) and found.file is None:
        sums = [0.0 if x is None else float(x.sum()) for x in (*found.layers, *found.salience)]
        values["sensitivities"] = [round(4 * np.log2(max(abs(x), 1e-30))) for x in sums]
    return repr(sorted(values.items()))


def _sums(weight: mx.array) -> list[int]:
    """Two sums of an array's words, each word times a number that depends on its place."""
    flat = weight.reshape(-1)
    flat = mx.pad(flat, (0, -flat.size % 4)) if flat.itemsize < 4 else flat
    words = flat.view(mx.uint32)
    sums = [0, 0]
    for start in range(0, words.size, _PART):
        part = words[start : start + _PART]
        place = mx.arange(start, start + part.size).astype(mx.uint32)
        for i, factor in enumerate((2654435761, 2246822519)):
            mixed = (part ^ (part >> 15)) * (place * factor | 1)
            total: Any = mixed.sum().item()
            sums[i] = (sums[i] + total) % (1 << 32)
    return sums
