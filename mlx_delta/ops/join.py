"""Far and near keys, put together into one array in which a key's index is its position."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def join_near(
    far: mx.array | None,
    near: mx.array,
    boundaries: Sequence[int],
    firsts: Sequence[int],
    length: int,
) -> mx.array:
    """Far keys before each row's boundary, near keys from there on.

    Args:
        far: [B, H, tokens, D], from position 0 on; ``None``: not any.
        near: [B, H, room, D], of each row from its own position on.
        boundaries: Position of each row's first near key in the result.
        firsts: Position of each row's first near key in ``near``.
        length: Tokens of the longest row; what follows a row's own end is undefined.

    Returns:
        [B, H, length, D].
    """
    if far is None:
        far = near[:, :, :0]
    if len(set(zip(boundaries, firsts, strict=True))) == 1:
        boundary, first = boundaries[0], firsts[0]
        keys = near[:, :, boundary - first : length - first]
        if boundary:
            keys = mx.concatenate([far[:, :, :boundary], keys], axis=2)
        if keys.shape[2] < length:
            keys = mx.pad(keys, [(0, 0), (0, 0), (0, length - keys.shape[2]), (0, 0)])
        return keys
    token = mx.arange(length)
    in_near = token - mx.array(list(firsts))[:, None]
    in_near = mx.clip(in_near, 0, near.shape[2] - 1) + far.shape[2]
    index = mx.where(token < mx.array(list(boundaries))[:, None], token, in_near)
    return mx.take_along_axis(mx.concatenate([far, near], axis=2), index[:, None, :, None], axis=2)
