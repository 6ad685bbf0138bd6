"""Caches as others quantize them, for comparison: rotated codes, and keys by channel.

mlx-lm's own quantized cache is the other baseline. Like that one these are dense within a prompt's
first chunk and quantized after it; they are really stored in few bits, and written out in full for
each call, which is slow and lets any attention code take them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache, create_attention_mask

from mlx_delta.cache.buffers import grow

GROUP = 64  # numbers that share a scale and an offset; of KIVI's keys, tokens
STEP = 256  # tokens by which buffers grow, as mlx-lm's

Codes = tuple[mx.array, ...]  # words, scales and biases, as mx.quantize gives them


class QuantizedStore(_BaseCache):
    """What the baselines share: codes in buffers that grow as mlx-lm's do, and mlx-lm's contract.

    Args:
        bits: Of a code.

    Attributes:
        offset: Tokens so far.
    """

    # Where a call would see other codes after more tokens: at multiples of so many tokens.
    period: ClassVar[int | None] = None

    def __init__(self, bits: int):
        # Not "bits": mlx-lm takes a cache that has those for one of its own.
        self.width = bits
        self.offset = 0
        self._buffers: dict[str, Codes] = {}

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, Hkv, L, D] and values [B, Hkv, L, Dv]; all so far, [B, Hkv, S, ..]."""
        raise NotImplementedError

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The causal mask for the next ``N`` tokens, in mlx-lm's forms."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    def size(self) -> int:
        """Tokens so far."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing was written."""
        return self.offset == 0

    @property  # type: ignore[misc]
    def state(self) -> list[Any]:  # only to be evaluated: nothing restores these caches
        """All arrays."""
        return [array for codes in self._buffers.values() for array in codes]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self.state)

    def _write(self, name: str, codes: Codes, start: int, step: int = STEP) -> None:
        """Put codes [B, Hkv, n, ..] from an index on; the buffers grow by ``step``."""
        rows = codes[0].shape[2]
        room = -(-(start + rows) // step) * step
        written = []
        for i, part in enumerate(codes):
            shape = (*part.shape[:2], room, part.shape[3])
            buffer = grow(self._buffers[name][i] if start else None, shape, part.dtype)
            buffer[:, :, start : start + rows] = part
            written.append(buffer)
        self._buffers[name] = tuple(written)

    def _read(self, name: str, rows: int) -> mx.array:
        """The first numbers that codes stand for, [B, Hkv, rows, ..]."""
        words, scales, biases = (part[:, :, :rows] for part in self._buffers[name])
        return mx.dequantize(words, scales, biases, GROUP, self.width)


class RotatedKVCache(QuantizedStore):
    """Keys and values turned by a Hadamard matrix along the head, then quantized token by token.

    As llama.cpp does with a quantized cache: turned, no channel stands out, so that 64 numbers of a
    token can share a scale. The format is MLX's (a scale and an offset for 64 numbers: 4.5 bits a
    number at 4 bits, as llama.cpp's q4_0 takes with a scale for 32).
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append; but for the first call, what is returned has been through the codes.

        Raises:
            ValueError: There is no Hadamard matrix of the heads' size.
        """
        start = self.offset
        self.offset += keys.shape[2]
        for name, x in (("keys", keys), ("values", values)):
            self._write(name, mx.quantize(_turn(x), GROUP, self.width), start)
        if not start:
            return keys, values
        return _turn(self._read("keys", self.offset)), _turn(self._read("values", self.offset))


class ChannelKVCache(QuantizedStore):
    """KIVI (arXiv 2402.02750): keys quantized channel by channel, values token by token.

    64 tokens share the scale of a channel of keys. Keys and values of the last tokens, up to 63 of
    them, are full until their group is, and so are those of one call: a prompt's first chunk sees
    nothing quantized.
    """

    period = GROUP

    def __init__(self, bits: int):
        super().__init__(bits)
        self._recent: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append; groups before the call have been through the codes, the call's tokens not."""
        groups = self.offset // GROUP
        recent: tuple[mx.array, ...] = (keys, values)
        if self._recent:
            pairs = zip(self._recent, recent, strict=True)
            recent = tuple(mx.concatenate([old, new], axis=2) for old, new in pairs)
        fetched = recent
        if groups:
            B, H, _, D = keys.shape
            by_channel = self._read("keys", groups).reshape(B, H, groups, D, GROUP)
            quantized = by_channel.swapaxes(3, 4).reshape(B, H, -1, D)
            fetched = (
                mx.concatenate([quantized, recent[0]], axis=2),
                mx.concatenate([self._read("values", groups * GROUP), recent[1]], axis=2),
            )
        self.offset += keys.shape[2]
        self._finish_groups(groups, recent)
        return fetched[0], fetched[1]

    def _finish_groups(self, groups: int, recent: tuple[mx.array, ...]) -> None:
        """Quantize the groups that are complete."""
        done = (self.offset // GROUP - groups) * GROUP
        if done:
            keys, values = (x[:, :, :done] for x in recent)
            B, H, _, D = keys.shape
            by_channel = keys.reshape(B, H, -1, GROUP, D).swapaxes(3, 4)  # [B, H, groups, D, GROUP]
            codes = mx.quantize(by_channel, GROUP, self.width)
            rows = tuple(x.reshape(B, H, done // GROUP, -1) for x in codes)
            self._write("keys", rows, groups, STEP // GROUP)
            self._write("values", mx.quantize(values, GROUP, self.width), groups * GROUP)
        self._recent = tuple(mx.contiguous(x[:, :, done:]) for x in recent)

    @property  # type: ignore[misc]
    def state(self) -> list[Any]:  # only to be evaluated: nothing restores these caches
        """All arrays."""
        return [*super().state, *self._recent]


def _turn(x: mx.array) -> mx.array:
    """The product with a Hadamard matrix along the last axis, which undoes itself."""
    size = x.shape[-1]
    if size < GROUP or size & (size - 1):
        raise ValueError(f"[kv4-rotated] heads must be of 64, 128, 256 .. numbers but got {size}.")
    return mx.hadamard_transform(x)


BASELINES: dict[str, tuple[type[QuantizedStore], int]] = {
    "kv4-rotated": (RotatedKVCache, 4),
    "kivi4": (ChannelKVCache, 4),
    "kivi2": (ChannelKVCache, 2),
}
