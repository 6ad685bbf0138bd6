"""What the stores of keys and values share: growing, padding and writing row by row."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

# A row index: every row, or some of them.
Rows = slice | mx.array


def equal_rows(*counts: Sequence[int]) -> dict[tuple[int, ...], Rows]:
    """Rows that agree in all counts, to be worked on together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(zip(*counts, strict=True)):
        groups.setdefault(key, []).append(row)
    if len(groups) == 1:
        return {key: slice(None) for key in groups}
    return {key: mx.array(rows) for key, rows in groups.items()}


def grow(buffer: mx.array | None, shape: Sequence[int], dtype: mx.Dtype, axis: int = 2) -> mx.array:
    """A buffer of this shape that starts with what the old one held; longer on one axis only."""
    if buffer is None:
        return mx.zeros(tuple(shape), dtype)
    if buffer.shape[axis] >= shape[axis]:
        return buffer
    room = list(shape)
    room[axis] -= buffer.shape[axis]
    return mx.concatenate([buffer, mx.zeros(room, buffer.dtype)], axis=axis)


def pad_to(buffer: mx.array, size: int, axis: int = 2) -> mx.array:
    """The buffer with zeros behind it on one axis, up to a size."""
    padding = [(0, 0)] * buffer.ndim
    padding[axis] = (0, size - buffer.shape[axis])
    return mx.pad(buffer, padding)


def write_tokens(buffer: mx.array, new: mx.array, starts: Sequence[int]) -> mx.array:
    """Put tokens at each row's own index; those before index 0 are padding and left out.

    Args:
        buffer: [B, H, capacity, D]; changed in place.
        new: [B, H, L, D].
        starts: Index of each row's first new token; one entry where all rows agree.

    Returns:
        The buffer with the tokens in it.
    """
    steps = new.shape[2]
    if len(set(starts)) == 1:
        start = starts[0]
        skip = max(0, -start)
        buffer[..., start + skip : start + steps, :] = new[..., skip:, :]
    elif steps == 1 and min(starts) >= 0:
        index = mx.array(list(starts))[:, None, None, None]
        buffer = mx.put_along_axis(buffer, index, new, axis=2)
    else:
        for row, start in enumerate(starts):
            skip = max(0, -start)
            if skip < steps:
                buffer[row, :, start + skip : start + steps] = new[row, :, skip:]
    return buffer


def write_first(first: mx.array, new: mx.array, starts: Sequence[int]) -> mx.array:
    """The first tokens of each row [B, H, n, D], with those of them that are among new ones.

    Args:
        first: The first ``n``; stays as it is.
        new: [B, H, L, D].
        starts: Position of each row's first new token.
    """
    count = first.shape[2]
    if not count or min(starts) >= count:
        return first
    first = first[...]
    for (start,), rows in equal_rows(starts).items():
        begin, end = max(0, start), min(count, start + new.shape[2])
        if begin < end:
            first[rows, :, begin:end] = new[rows, :, begin - start : end - start]
    return first


def take_out(buffer: mx.array, start: int, counts: Sequence[int], axis: int = 2) -> mx.array:
    """The buffer without so many entries of each row from ``start`` on; what follows moves up.

    Args:
        buffer: [B, H, capacity, ..].
        start: The first entry that goes.
        counts: How many go, in each row; one that loses fewer than others ends with zeros.
        axis: Of the entries.
    """
    index: list[slice] = [slice(None)] * buffer.ndim

    def without(rows: slice, count: int) -> mx.array:
        index[0], index[axis] = rows, slice(0, start)
        before = buffer[tuple(index)]
        index[axis] = slice(start + count, None)
        return mx.concatenate([before, buffer[tuple(index)]], axis=axis)

    if len(set(counts)) == 1:
        return without(slice(None), counts[0])
    size = buffer.shape[axis] - min(counts)
    rows = [pad_to(without(slice(i, i + 1), n), size, axis) for i, n in enumerate(counts)]
    return mx.concatenate(rows)
