"""What the caches of one text and of a batch share: stores, positions, and rewinding.

Positions count from the start of a row's own text, whatever padding the batch came with. A block
is encoded once no later query's window reaches it. Keys are stored in full (``dense_keys``) or
in few bits (``far_keys``), as the setting says.
"""

from __future__ import annotations

import contextvars
import itertools
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig
from mlx_delta.ops.tiles import TileCount, TilePlan

from .dense_keys import DenseKeys
from .dropping import Dropping, stored
from .kinds import key_kind, value_kind
from .state import CacheState
from .step import Part, Step
from .store import spread
from .written_out import FEW_TOKENS, WrittenOut

# Set while something asks whether any number of tokens could be taken back, not only the last ones.
ANY_LENGTH = contextvars.ContextVar("any_length", default=False)


class HeldKeys(CacheState):
    """Stores of keys and values, and which blocks are encoded.

    Subclasses say how many rows there are; from the first update on, every count has one entry
    for each.

    Args:
        config: The setting of this layer; the default one when not given.
    """

    # Where a prompt ends, if that is known: tiles of its end are all computed.
    prompt_length: int | None = None
    # Of caches that look on instead of keeping: attention itself, of queries, keys, values, scale.
    attend: Any = None

    def __init__(self, config: DeltaConfig | None = None):
        self._begin(config or DeltaConfig())

    def _begin(self, config: DeltaConfig) -> None:
        """Become an empty cache."""
        self.config = config
        self.tile_count = TileCount()  # of a prefill by tiles, over all that was attended to here
        self._lengths = [0]
        self._encoded = [0]
        self._dropped = [0]
        self._sizes = None
        self._keys = None
        self._values = None
        self._written = WrittenOut()

    # Reading and writing.

    @property
    def offset(self) -> Any:
        """Position of the next token: an int, or for a batch one per row, [B]."""
        raise NotImplementedError

    def update(self, keys: mx.array, values: mx.array) -> Step:
        """Append keys [B, Hkv, L, D] and values [B, Hkv, L, Dv] to every row.

        Raises:
            ValueError: They do not fit each other, the setting, or what is in the cache; or blocks
                would have to be dropped on the way, which :meth:`updates` does.
        """
        parts = self.updates(keys, values)
        if len(parts) > 1:
            raise ValueError(
                f"[{type(self).__name__}.update] {keys.shape[2]} tokens at once drop blocks on the "
                f"way at max_size={self.config.max_size}; see updates."
            )
        return parts[0].step

    def updates(self, keys: mx.array, values: mx.array) -> list[Part]:
        """Append keys and values as :meth:`update`, in parts between which blocks are dropped."""
        self._check_new(keys, values)
        steps = keys.shape[2]
        if self._keys is None or self._values is None:
            self._make_stores(keys, values)
        if self.config.block_fraction is not None:
            self._fix_block_size(steps)
        dropping = Dropping.of(self.config)
        if dropping is None:
            step = self._append(keys, values)
            return [Part(0, steps, step, (0,) * len(self._lengths), 0)]
        ends = self._ends(steps)
        cuts = {0, steps}
        for start, end in zip(self._lengths, ends, strict=True):
            cuts |= {cut - start for cut in dropping.cuts(max(0, start), end)}
        parts = []
        for first, end in itertools.pairwise(sorted(cuts)):
            # A row whose text has ended drops no more: what comes is padding.
            places = [min(n, e - 1) for n, e in zip(self._lengths, ends, strict=True)]
            self._drop(dropping, [dropping.dropped(max(0, place)) for place in places])
            step = self._append(keys[:, :, first:end], values[:, :, first:end], ends)
            gone = tuple(n * dropping.size for n in self._dropped)
            part = Part(first, end, step, gone, dropping.first * dropping.size)
            # What the next part writes over is not to change what this one sees.
            parts.append(part if end == steps else part.kept())
        return parts

    def _drop(self, dropping: Dropping, wanted: list[int]) -> None:
        """Let so many blocks of each row be gone."""
        new = [max(0, n - gone) for n, gone in zip(wanted, self._dropped, strict=True)]
        if not any(new):
            return
        self._written.clear()
        assert self._keys is not None and self._values is not None
        self._keys.drop(dropping.first, new)
        self._values.drop(dropping.first, new, dropping.size)
        self._dropped = [n + gone for n, gone in zip(new, self._dropped, strict=True)]

    def _append(self, keys: mx.array, values: mx.array, text_ends: list[int] | None = None) -> Step:
        """Append to the stores, in which dropped blocks leave no gap."""
        assert self._keys is not None and self._values is not None
        steps, size = keys.shape[2], self.config.block_size
        starts = tuple(stored(self._lengths, self._dropped, size))
        length = max(starts) + steps
        capacity = -(-length // self.step) * self.step
        if self.config.block_fraction is None:
            ends = [n + steps for n in self._lengths]
            pairs = zip(ends, self._ends(steps) if text_ends is None else text_ends, strict=True)
            targets = self._far_blocks([min(pair) - 1 for pair in pairs])
            targets = [max(pair) for pair in zip(targets, self._encoded, strict=True)]
        else:
            targets = list(self._encoded)
        encoded = stored(targets, self._dropped)
        read = self._values.write(values, starts, capacity, encoded)
        far, near, firsts = self._keys.append(keys, starts, encoded, capacity)
        self._lengths = [n + steps for n in self._lengths]
        self._encoded = targets
        step = Step(
            starts=starts,
            steps=keys.shape[2],
            block_sizes=tuple(
                self.block_sizes if self.config.block_fraction is None else [length] * len(starts)
            ),
            window_blocks=self.config.window_blocks,
            far=far,
            near=near,
            firsts=tuple(firsts),
            encoded=tuple(encoded),
            stored_values=read,
            dtype=values.dtype,
            config=self.config,
            tiles=self._tile_plan(),
        )
        return self._written.follow(step, keys, values)

    def _tile_plan(self) -> TilePlan | None:
        """What a prefill by tiles needs to know; ``None`` where the setting asks for none."""
        if self.config.prefill == "exact":
            return None
        end = self.prompt_length
        if end is not None:
            end -= self._dropped[0] * self.config.block_size
        return TilePlan(self.config.tile_share, end, self.tile_count)

    def _make_stores(self, keys: mx.array, values: mx.array) -> None:
        """Stores for this shape and type, as the setting asks for."""
        kind, of_values = key_kind(self.config), value_kind(self.config)
        self.config.check_heads(keys.shape[1])
        kind.check_new(self.config, keys)
        of_values.check_new(self.config, values)
        self._lengths, self._encoded, self._dropped = (
            spread(counts, keys.shape[0])
            for counts in (self._lengths, self._encoded, self._dropped)
        )
        self._keys = kind.make(self.config, keys)
        if self._sizes is not None:
            self._keys = DenseKeys.make(self.config, keys, sizes=self._sizes)
        self._values = of_values.make(self.config, values)
        self._model = (keys.shape[1], keys.shape[3], values.shape[3])
        self._item_size = keys.itemsize

    def _fix_block_size(self, steps: int) -> None:
        """For a block size that is a share of the prompt: fix it when the prompt is over.

        Prompts come in chunks, and nothing says which is the last one but that few tokens follow,
        the prompt's last or the first generated ones. Until then every query sees full keys.
        """
        if steps > FEW_TOKENS:
            return
        assert isinstance(self._keys, DenseKeys)  # a setting with key_bits has a fixed size
        self._held_from = max(self._lengths)
        self.config = self.config.resolve(self._held_from + steps)
        self._keys = self._keys.with_setting(self.config)

    def _check_new(self, keys: mx.array, values: mx.array) -> None:
        """Refuse keys and values that do not fit each other, or what the cache holds."""
        name = type(self).__name__
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"[{name}] keys and values must be [B, Hkv, L, D] with the same B, Hkv and L but "
                f"have shapes {tuple(keys.shape)} and {tuple(values.shape)}."
            )
        got = (keys.shape[1], keys.shape[3], values.shape[3])
        if self._model is not None and got != self._model:
            raise ValueError(
                f"[{name}] the cache is of a model with kv heads and head "
                f"dimensions {self._model} but these keys and values have {got}."
            )
        if len(self._lengths) != keys.shape[0] and not (self._keys is None and self._any_rows):
            raise ValueError(
                f"[{name}] the cache has {len(self._lengths)} rows but these keys have "
                f"{keys.shape[0]}."
            )

    _any_rows = False  # whether the first update says how many rows there are

    def _ends(self, steps: int) -> list[int]:
        """The end of each row's text after ``steps`` more tokens."""
        return [length + steps for length in self._lengths]

    def _far_blocks(self, positions: list[int]) -> list[int]:
        """How many blocks a query of each row sees as held ones, at these positions."""
        rows = zip(positions, self.block_sizes, strict=True)
        return [max(0, position // size - self.config.window_blocks) for position, size in rows]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append, and return keys and values for attention code that knows nothing of deltas.

        Exact for one query. For several the window is the first query's, so that later ones see
        a few more full keys than they need; ``delta_attention`` gives every query its own window.
        """
        step = self.update(keys, values)
        length = step.length
        near = min(
            max(0, start // size - step.window_blocks) * size
            for start, size in zip(step.starts, step.block_sizes, strict=True)
        )
        if step.steps == 1 or near == 0:
            one = step.steps == 1
            fetched = (step.held, step.held_values) if one else (step.full, step.values)
            return fetched[0][..., :length, :], fetched[1][..., :length, :]
        keys, values = (
            mx.concatenate([far[..., :near, :], full[..., near:length, :]], axis=2)
            for far, full in ((step.held, step.full), (step.held_values, step.values))
        )
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys (held far away, full near) and values of all tokens so far that were not dropped."""
        if self._keys is None or self._values is None:
            raise ValueError(f"[{type(self).__name__}.keys_and_values] the cache is empty.")
        size = max(0, *stored(self._lengths, self._dropped, self.config.block_size))
        encoded = stored(self._encoded, self._dropped)
        keys = self._keys.fetch(size, encoded)
        return keys, self._values.fetch(size, encoded, keys.dtype)

    def wait_for(self, other: mx.array) -> None:
        """Let the state be evaluated only together with another array."""
        if self._values is not None:
            self._values.wait_for(other)

    # Rewinding.

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back exactly: the last ones always, see :meth:`exact_trim`.

        mlx-lm's ``LRUPromptCache`` asks this before it takes back any number of tokens; there it
        is true only where that is exact too.
        """
        return not ANY_LENGTH.get() or self.exact_trim() == self.size()

    def exact_trim(self) -> int:
        """How many of the last tokens can be taken back, any number of them, exactly.

        All of them while no full key is gone; else those back to where the window begins to
        reach keys that are held only. See :meth:`exact_length` for what is exact further back.
        """
        length = self.size()
        if self._keys is None:
            return length
        back = [
            length if not full_from else own - (full_from + self.config.window)
            for own, full_from in zip(self._lengths, self.full_from, strict=True)
        ]
        dropping = Dropping.of(self.config)
        if dropping is not None and any(self._dropped):
            begins = map(dropping.begins, self._dropped)
            back += [own - begin for own, begin in zip(self._lengths, begins, strict=True)]
        return max(0, min(length, *back))

    @property
    def full_from(self) -> list[int]:
        """Position in each row from which on all keys are at hand in full."""
        size = self.config.block_size
        return [
            first + gone * size
            for first, gone in zip(self._stored.full_from, self._dropped, strict=True)
        ]

    def exact_length(self, length: int) -> int:
        """The largest length, up to this one, at which the text can be cut and go on exactly.

        Within :meth:`exact_trim`, every length. Further back the full keys of the window are gone.
        They can't be had by feeding a window's tokens again: their own keys depend, layer by
        layer, on the windows before them. So without a window (``window=0``) every block's border
        will do, and with one only the start of the text.
        """
        for candidate in (length, *(length // size * size for size in self.block_sizes)):
            if self._cuts_exactly(max(self._lengths) - candidate):
                return candidate
        return 0

    def _cuts_exactly(self, n: int) -> bool:
        """Whether all full keys that the next query needs are there after taking back n tokens."""
        if self._keys is None:
            return True
        lengths = [length - n for length in self._lengths]
        pairs = zip(self._far_blocks(lengths), self.block_sizes, strict=True)
        near = [far * size for far, size in pairs]
        dropping = Dropping.of(self.config)
        if dropping is not None and any(
            length > 0 and dropping.dropped(length) < gone
            for length, gone in zip(lengths, self._dropped, strict=True)
        ):
            return False
        return all(
            first >= min(full_from, max(0, length))
            for first, full_from, length in zip(near, self.full_from, lengths, strict=True)
        )

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every row; returns how many were forgotten.

        Raises:
            ValueError: The text could not go on exactly from there.
        """
        n = max(0, min(self.size(), n))
        if n == 0 or self._keys is None or self._values is None:
            return n
        if not self._cuts_exactly(n):
            raise ValueError(
                f"[{type(self).__name__}.trim] of {self.size()} tokens the last "
                f"{self.exact_trim()} can be taken back exactly but not {n}: full keys are gone. "
                "mlx_delta.cache.rewind goes back further and says which tokens to feed again."
            )
        self._written.clear()
        self._lengths = [length - n for length in self._lengths]
        targets = [
            min(pair) for pair in zip(self._far_blocks(self._lengths), self._encoded, strict=True)
        ]
        gone = [0 if n <= 0 else d for n, d in zip(self._lengths, self._dropped, strict=True)]
        self._keys.rewind(stored(self._encoded, self._dropped), stored(targets, gone))
        self._values.rewind(stored(targets, gone))
        self._encoded, self._dropped = targets, gone
        self._held_from = min(self._held_from, self.size())
        return n

    def near_arrays(self) -> list[mx.array] | None:
        """What the next token of a single text needs, for a mark.

        Full keys [1, Hkv, n, D], and full values [1, Hkv, n, Dv] where far ones are others.
        """
        if self._keys is None or self._values is None:
            return None
        first = self._encoded[0] * self.config.block_size
        keys = self._keys.full_keys(first, self._lengths[0])
        values = self._values.full_values(first, self._lengths[0])
        return [keys] if values is None else [keys, values]

    def return_to(self, length: int, near: list[mx.array] | None) -> None:
        """Take a single text back to a length at which :meth:`near_arrays` gave ``near``."""
        if self._keys is None or self._values is None or near is None:
            return
        size = self.config.block_size
        self._written.clear()
        self._encoded = [(length - near[0].shape[2]) // size]
        self._lengths = [length]
        self._keys.refill(self._encoded[0], near[0])
        self._values.refill(self._encoded[0], near[-1])
        self._held_from = min(self._held_from, length)
