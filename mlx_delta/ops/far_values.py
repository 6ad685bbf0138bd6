"""What the decode kernels over coded far keys take besides those, and the checks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_delta.widths import VALUE_WIDTHS

from .launching import check_shapes

TOKENS = 64  # of a block
HEAD_DIMS = range(16, 257, 8)


@dataclass(frozen=True)
class CodedValues:
    """Values as codes far away, turned, and full near.

    Attributes:
        words: uint32 [B, 1, capacity, sum of the heads' words], from token 0 on.
        scales: uint8 [B, 1, capacity, Hkv * groups].
        near: [B, Hkv, room, D] of the storage type.
        sinks: [B, Hkv, n_sinks, D], exact values of the first tokens; as many as exact keys.
        widths: Bits of a code of each kv head.
    """

    words: mx.array
    scales: mx.array
    near: mx.array
    sinks: mx.array
    widths: tuple[int, ...]


def refusal(head_dim: int, tokens: int, value_dim: int) -> str | None:
    """Why the kernels do not take such keys and values; ``None`` if they do.

    Args:
        head_dim: D.
        tokens: Of a block.
        value_dim: Dv.
    """
    if tokens != TOKENS:
        return f"coded blocks have {tokens} tokens, not {TOKENS}"
    if value_dim != head_dim:
        return f"values have another dimension ({value_dim}) than keys ({head_dim})"
    if head_dim not in HEAD_DIMS:
        return f"the head dimension {head_dim} is not a multiple of 8 up to {HEAD_DIMS[-1]}"
    return None


def check_decode(
    name: str,
    shape: tuple[int, int, int, int],
    sinks: mx.array | None,
    queries: mx.array,
    rows: Sequence[tuple[int, int, int, int]],
    near: mx.array,
    values: CodedValues | mx.array,
    mask: mx.array | None,
    window_blocks: int,
) -> None:
    """Refuse what would make a kernel read past an array's end.

    Args:
        name: Of the kernel.
        shape: Rows, kv heads, blocks that there is room for, and D, of the far keys.
        sinks: Exact keys of the first tokens.
        queries: As for the kernel's launcher, and so are the rest.
        rows: See there.
        near: See there.
        values: See there.
        mask: See there.
        window_blocks: See there.

    Raises:
        ValueError: Something does not fit; the message names it.
    """
    B, kv_heads, capacity, D = shape
    exact = values.near if isinstance(values, CodedValues) else values
    shapes: dict[str, tuple[mx.array | None, Sequence[int | None] | None]] = {
        "queries": (queries, (B, None, None, D)),
        "sinks": (sinks, None if sinks is None else (B, kv_heads, None, D)),
        "near": (near, (B, kv_heads, None, D)),
        "values": (exact, (B, kv_heads, None, D)),
    }
    check_shapes(name, shapes, {"sinks": near.dtype})
    if isinstance(values, CodedValues):
        n_sinks = 0 if sinks is None else sinks.shape[2]
        _check_values(name, values, (B, kv_heads, n_sinks, D))
    _, n_heads, steps, _ = queries.shape
    if not steps or not n_heads or n_heads % kv_heads:
        raise ValueError(f"[{name}] queries {tuple(queries.shape)} do not fit {kv_heads} kv heads.")
    length = max(start for start, *_ in rows) + steps if rows else 0
    if mask is not None:
        columns = mask.shape[2] if mask.ndim == 3 else None
        check_shapes(name, {"mask": (mask, (None, steps, columns))}, {"mask": mx.bool_})
        if mask.shape[0] not in (1, B) or mask.shape[2] < length:
            raise ValueError(
                f"[{name}] mask must be [1 or {B}, {steps}, {length}] but has shape "
                f"{tuple(mask.shape)}."
            )
    if len(rows) != B:
        raise ValueError(f"[{name}] got numbers of {len(rows)} rows for {B} rows of queries.")
    coded_tokens = (values.words if isinstance(values, CodedValues) else exact).shape[2]
    for start, stored, first, value_first in rows:
        near_from = max(max(start, 0) // TOKENS - window_blocks, 0) * TOKENS
        end = max(start + steps, 1)
        if (
            not 0 <= stored <= capacity
            or stored * TOKENS > coded_tokens
            or max(end - 1, 0) // TOKENS - window_blocks > stored
            or not 0 <= first <= near_from
            or not 0 <= value_first <= near_from
            or end - first > near.shape[2]
            or end - value_first > exact.shape[2]
        ):
            raise ValueError(
                f"[{name}] a row at position {start} with {stored} coded blocks, near keys from "
                f"{first} on and near values from {value_first} on does not fit {capacity} blocks, "
                f"{coded_tokens} coded tokens, {near.shape[2]} near keys and {exact.shape[2]} "
                "near values."
            )


def _check_values(name: str, values: CodedValues, sinks: tuple[int, int, int, int]) -> None:
    B, kv_heads, _, D = sinks
    if len(values.widths) != kv_heads or any(width not in VALUE_WIDTHS for width in values.widths):
        raise ValueError(f"[{name}] widths {values.widths} do not fit {kv_heads} kv heads.")
    tokens = values.words.shape[2] if values.words.ndim == 4 else None
    groups = values.scales.shape[-1]
    if groups % kv_heads or not groups or D % (8 * groups // kv_heads):
        raise ValueError(f"[{name}] {groups} scales do not fit {kv_heads} values of {D}.")
    check_shapes(
        name,
        {
            "sinks": (values.sinks, sinks),
            "words": (values.words, (B, 1, tokens, sum(D * w // 32 for w in values.widths))),
            "scales": (values.scales, (B, 1, tokens, groups)),
        },
        {"words": mx.uint32, "scales": mx.uint8, "sinks": values.near.dtype},
    )
