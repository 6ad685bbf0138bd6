"""The key-value cache of hybrid delta attention: held keys far away, full keys near.

:class:`DeltaKVCache` fulfils mlx-lm's cache contract for one text (or several of equal length);
its twin for ragged batches is in ``batch_cache.py``. What they share is :class:`HeldKeys`.

Positions count from the start of a row's own text, whatever padding the batch came with. A block
is encoded once no later query's window reaches it. Keys are stored in full
(``dense_keys.py``) or packed (``packed_keys.py``), as the setting says.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import _BaseCache

from mlx_delta.config import DeltaConfig

from .dense_keys import DenseKeys, KeyView
from .packed_keys import PackedKeys
from .packed_view import PackedView
from .values import ValueStore

STATE_VERSION = 1


class HybridKeys:
    """What an update leaves for attention to read.

    Attributes:
        keys: The keys as they are stored; ``held`` and ``full`` are views of them.
        stored_values: The values as they are stored.
        starts: Position of each row's first query; one entry when all rows agree.
        length: Keys to look at, over all rows: one more than the last query's position.
        block_size: Tokens in a block.
        window_blocks: Blocks before a query's own that stay exact.
    """

    def __init__(
        self,
        keys: KeyView | PackedView,
        values: ValueStore,
        starts: tuple[int, ...],
        length: int,
        config: DeltaConfig,
        dtype: mx.Dtype,
    ):
        self.keys = keys
        self.stored_values = values
        self.starts = starts
        self.length = length
        self.block_size = config.block_size
        self.window_blocks = config.window_blocks
        self._dtype = dtype

    @property
    def held(self) -> mx.array:
        """[B, Hkv, length or more, D]; held keys in every block far from the last query."""
        return self.keys.held

    @property
    def full(self) -> mx.array:
        """[B, Hkv, length or more, D]; full keys in every block near to the first query."""
        return self.keys.full

    @cached_property
    def values(self) -> mx.array:
        """[B, Hkv, length, Dv], of the model's type."""
        return self.stored_values.dense(self.length, self._dtype)


class HeldKeys(_BaseCache):
    """Stores of keys and values, and which blocks are encoded.

    Subclasses say how many rows there are. ``_lengths`` and ``_encoded`` (tokens, and encoded
    blocks) have one entry per row, or a single one where all rows agree.
    """

    step = 256  # tokens by which the buffers grow, as in mlx-lm
    # Of caches that look on instead of keeping: attention itself, of queries, keys, values, scale.
    attend: Any = None

    # Kv heads, and dimensions of a key and a value; None before the first update.
    _model: tuple[int, ...] | None = None
    _item_size = 0  # bytes of a number of the model's type

    def __init__(self, config: DeltaConfig | None = None):
        self.config = config or DeltaConfig()
        self._lengths: list[int] = [0]
        self._encoded: list[int] = [0]
        self._make_stores()

    def _make_stores(self) -> None:
        """Empty stores, as the setting asks for."""
        store = DenseKeys if self.config.key_bits is None else PackedKeys
        self._keys: DenseKeys | PackedKeys = store(self.config, len(self._lengths))
        self._values = ValueStore(self.config.value_bits)

    # Reading and writing.

    @property
    def offset(self) -> Any:
        """Position of the next token: an int, or for a batch one per row, [B]."""
        raise NotImplementedError

    def update(self, keys: mx.array, values: mx.array) -> HybridKeys:
        """Append keys [B, Hkv, L, D] and values [B, Hkv, L, Dv] to every row."""
        steps = keys.shape[2]
        if self.config.block_fraction is not None:
            self.config = self._keys.config = self.config.resolve(steps)
        self._check_shapes(keys, values)
        starts = tuple(self._lengths)
        length = max(starts) + steps
        capacity = -(-length // self.step) * self.step
        self._values.write(values, starts, capacity)
        targets = self._far_blocks([end - 1 for end in self._ends(steps)])
        targets = [max(pair) for pair in zip(targets, self._encoded, strict=True)]
        view = self._keys.append(keys, starts, targets, capacity)
        self._lengths = [start + steps for start in starts]
        self._encoded = targets
        return HybridKeys(view, self._values, starts, length, self.config, values.dtype)

    def _check_shapes(self, keys: mx.array, values: mx.array) -> None:
        """Refuse the keys of another model than the cache holds."""
        got = (keys.shape[1], keys.shape[3], values.shape[3])
        if self._model is None:
            self.config.check_heads(keys.shape[1])
            self._keys.check_new(keys)
            self._values.check_new(values)
            self._model, self._item_size = got, keys.itemsize
        if got != self._model:
            raise ValueError(
                f"[{type(self).__name__}] the cache is of a model with kv heads and head "
                f"dimensions {self._model} but these keys and values have {got}."
            )
        buffers = self._values.buffers
        if buffers is not None and buffers[0].shape[0] != keys.shape[0]:
            raise ValueError(
                f"[{type(self).__name__}] the cache has {buffers[0].shape[0]} rows but these keys "
                f"have {keys.shape[0]}."
            )

    def _ends(self, steps: int) -> list[int]:
        """The end of each row's text after ``steps`` more tokens."""
        return [length + steps for length in self._lengths]

    def _far_blocks(self, positions: list[int]) -> list[int]:
        """How many blocks a query at each position sees as held ones."""
        block_size, window_blocks = self.config.block_size, self.config.window_blocks
        return [max(0, position // block_size - window_blocks) for position in positions]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append, and return keys and values for attention code that knows nothing of deltas.

        Exact for one query. For several the window is the first query's, so that later ones see
        a few more full keys than they need; ``delta_attention`` gives every query its own window.
        """
        view = self.update(keys, values)
        first_block = min(view.starts) // view.block_size - view.window_blocks
        near = max(0, first_block) * view.block_size
        if keys.shape[2] == 1 or near == 0:
            fetched = view.held if keys.shape[2] == 1 else view.full
            return fetched[..., : view.length, :], view.values[..., : view.length, :]
        fetched = mx.concatenate(
            [view.held[..., :near, :], view.full[..., near : view.length, :]], axis=2
        )
        return fetched, view.values[..., : view.length, :]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys (held far away, full near) and values of all tokens so far."""
        length = self.size()
        keys = self._keys.fetch(length, self._encoded)
        return keys, self._values.dense(length, keys.dtype)

    # Rewinding.

    def is_trimmable(self) -> bool:
        """Always: see :meth:`trim` for what is exact."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every row; returns how many were forgotten.

        Exact for up to ``block_size`` tokens between two updates. Further back the full keys are
        gone, and the held ones stand in for them.
        """
        n = max(0, min(self.size(), n))
        self._lengths = [length - n for length in self._lengths]
        # The blocks in the next query's window have to hold full keys again.
        targets = self._far_blocks(self._lengths)
        targets = [min(pair) for pair in zip(targets, self._encoded, strict=True)]
        self._keys.rewind(self._encoded, targets, self._lengths)
        self._encoded = targets
        return n

    # Bookkeeping.

    def size(self) -> int:
        """Tokens in the longest row."""
        return max(0, *self._lengths) if self._lengths else 0

    def empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._values.buffers is None

    @property
    def zeros(self) -> mx.array:
        """Zero deltas of each encoded block, int32 [B, Hkv, blocks]."""
        return self._keys.zeros

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return self._keys.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return self.key_nbytes + self.value_nbytes

    @property
    def key_nbytes(self) -> int:
        """Bytes allocated for keys: everything but the values."""
        return self._keys.nbytes

    @property
    def value_nbytes(self) -> int:
        """Bytes allocated for values."""
        return self._values.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that mlx-lm's dense cache would have allocated for as many tokens."""
        if self._model is None or self._values.buffers is None:
            return 0
        B = self._values.buffers[0].shape[0]
        H, head_dim, value_dim = self._model
        tokens = -(-self.size() // self.step) * self.step
        return B * H * tokens * (head_dim + value_dim) * self._item_size

    @property
    def state(self) -> list[Any]:
        """Everything needed to go on: a JSON header and the buffers."""
        keys, *others = self._keys.arrays()
        header = {
            "version": STATE_VERSION,
            "config": self.config.to_dict(whole=True),
            "lengths": self._lengths,
            "encoded": self._encoded,
            "model": self._model,
            "item_size": self._item_size,
            **self._keys.header(),
        }
        return [json.dumps(header), keys, *self._values.arrays(), *others]

    @state.setter
    def state(self, state: Any) -> None:
        name = type(self).__name__
        try:
            header = json.loads(state[0])
            version = header["version"]
            if version != STATE_VERSION:
                raise ValueError(
                    f"it has version {version} but this library reads version {STATE_VERSION}"
                )
            self.config = DeltaConfig.from_dict(header["config"])
            self._lengths, self._encoded = header["lengths"], header["encoded"]
            self._item_size = header["item_size"]
            self._model = None if header["model"] is None else tuple(header["model"])
            self._make_stores()
            end = 2 + self._values.n_arrays
            if len(state) != end + self._keys.n_arrays - 1:
                raise ValueError(f"it has {len(state)} parts")
            self._keys.restore(header, [state[1], *state[end:]])
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"[{name}] not a saved state of this cache: {error}; make the prompt cache anew."
            ) from error
        values = state[2:end]
        self._values.buffers = None if values[0] is None else tuple(values)
        self._check_state(name, state[1:])

    def _check_state(self, name: str, buffers: list[Any]) -> None:
        """Refuse a state whose counts and buffers do not fit together."""
        if len(self._lengths) != len(self._encoded):
            raise ValueError(f"[{name}] saved state has counts for different numbers of rows.")
        if all(x is None for x in buffers):
            return
        needed = [buffers[0], *(self._values.buffers or [None]), self._keys.zeros]
        if any(not isinstance(x, mx.array) for x in needed) or self._model is None:
            raise ValueError(f"[{name}] saved state lacks one of its buffers.")
        B, H, _, head_dim = buffers[0].shape
        if (H, head_dim) != self._model[:2] or len(self._lengths) not in (1, B):
            raise ValueError(
                f"[{name}] saved keys have shape {tuple(buffers[0].shape)} but the state is of "
                f"{len(self._lengths)} rows of a model of {self._model}."
            )
        self.config.check_heads(H)
        assert self._values.buffers is not None
        values = self._values.buffers[0]
        size = self.config.block_size
        capacity = self._keys.check(name, self._lengths, self._encoded) or values.shape[2]
        self._values.check(name, (B, H, capacity))
        for length, encoded in zip(self._lengths, self._encoded, strict=True):
            if length > capacity or not 0 <= encoded * size <= max(0, length):
                raise ValueError(
                    f"[{name}] saved state counts {length} tokens and {encoded} encoded blocks "
                    f"in a buffer of {capacity} tokens."
                )


class DeltaKVCache(HeldKeys):
    """Cache of one layer for one text, or for several texts of equal length.

    Args:
        config: The setting of this layer; the default one when not given.
    """

    @property
    def offset(self) -> int:
        """Tokens so far: the position of the next one."""
        return self._lengths[0]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The causal mask for the next ``N`` tokens, in the forms mlx-lm's attention takes."""
        if window_size is not None:
            return create_causal_mask(N, self.offset, window_size=window_size)
        if N == 1:
            return None
        return create_causal_mask(N, self.offset) if return_array else "causal"

    @classmethod
    def merge(cls, caches: list[DeltaKVCache]) -> Any:
        """A batch cache with one row for each of these caches."""
        from .batch import BatchDeltaKVCache

        return BatchDeltaKVCache.merge(caches)
