"""Keys and values written out for decode, on machines where no kernel reads stored ones.

Writing out all far blocks for each token takes longer than attention to them. So between tokens
they stay written out, up to a bound, where memory is plentiful, and only blocks that become far are
read. It is scratch: no part of a cache's state or of its bytes, made anew whenever it does not
fit, and let go for prompts.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlx_delta.ops.backend import has_kernels
from mlx_delta.ops.blocks import unpack
from mlx_delta.ops.storage import to_storage
from mlx_delta.system.memory import free_memory

from .buffers import grow, write_tokens
from .step import Step
from .values import ValueStore

# Layers that a model may have, each of which writes its own out: those of the largest.
MOST_LAYERS = 128
# Of a layer's keys and values together: 20,000 tokens of three heads of 64 in float32, 4,000 of
# eight heads of 128. Longer texts are written out strip by strip for each token.
MOST_BYTES = 1 << 25
# Tokens of one update, up to which it is taken for decode.
FEW_TOKENS = 8
STEP = 256  # tokens by which it grows


class WrittenOut:
    """The far and near keys and values of a layer, as attention reads them."""

    def __init__(self) -> None:
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self._ends: list[int] = []
        self._encoded: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now."""
        return sum(0 if x is None else x.nbytes for x in (self._keys, self._values))

    def clear(self) -> None:
        """Let go of it."""
        self._keys = self._values = None

    def follow(self, step: Step, keys: mx.array, values: mx.array) -> Step:
        """What an update's queries see, written out if that is worth it.

        Args:
            step: As the stores left it.
            keys: [B, Hkv, L, D], those that were appended.
            values: [B, Hkv, L, Dv].
        """
        if has_kernels() or step.far is None or isinstance(step.far, mx.array):
            return step
        room = -(-step.length // STEP) * STEP
        heads = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
        few = step.steps <= FEW_TOKENS and step.one_border
        if not few or not self._has_room(heads * room * keys.itemsize):
            self.clear()
            return step
        if not self._extend(step, keys, values, room):
            self._keys, self._values = (
                grow(x, (*x.shape[:2], room, x.shape[3]), x.dtype)
                for x in (step.held, step.held_values)
            )
        self._ends = [start + step.steps for start in step.starts]
        self._encoded = step.encoded
        assert self._keys is not None and self._values is not None
        return replace(
            step,
            far=self._keys,
            near=self._keys,
            firsts=(0,) * len(step.firsts),
            stored_values=ValueStore(None, self._values[...]),
        )

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes are within the bound, and every layer may take as much."""
        if size > MOST_BYTES:
            return False
        more = size - self.nbytes
        return more <= 0 or MOST_LAYERS * more <= free_memory(0)[0]

    def _extend(self, step: Step, keys: mx.array, values: mx.array, room: int) -> bool:
        """Write what is new, if all the rest is there already."""
        if self._keys is None or self._values is None or self._ends != list(step.starts):
            return False
        grown = set(zip(self._encoded, step.encoded, strict=True))
        moved = {pair for pair in grown if pair[0] != pair[1]}
        if moved and len(grown) > 1 or any(done > target for done, target in moved):
            return False
        rounded = [keys, values]
        if step.near.dtype != keys.dtype:
            rounded[0] = to_storage(keys).astype(keys.dtype)
        rounded[1] = step.stored_values.rounded(values)
        buffers = []
        for buffer, new in zip((self._keys, self._values), rounded, strict=True):
            whole = grow(buffer[...], (*buffer.shape[:2], room, buffer.shape[3]), buffer.dtype)
            buffers.append(write_tokens(whole, new, step.starts))
        for done, target in moved:
            assert step.far is not None and not isinstance(step.far, mx.array)
            assert step.block_size is not None
            left, right = done * step.block_size, target * step.block_size
            part = unpack(step.far.part(done, target), target - done)
            buffers[0][:, :, left:right] = part.astype(keys.dtype)
            if step.stored_values.differs:
                buffers[1][:, :, left:right] = step.stored_values.far(left, right, keys.dtype)
        self._keys, self._values = buffers
        return True
