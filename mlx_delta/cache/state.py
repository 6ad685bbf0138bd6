"""What a cache gives to be saved, and taking it back: nothing is believed before it is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig

from .dense_keys import DenseKeys
from .dropping import Dropping, stored
from .figures import CacheFigures
from .kinds import key_kind, value_kind
from .old_files import modern_state
from .store import spread

STATE_VERSION = 1


class CacheState(CacheFigures):
    """A cache's state: a JSON header and the buffers of its stores."""

    def _begin(self, config: DeltaConfig) -> None:
        """Become an empty cache."""
        raise NotImplementedError

    @property
    def state(self) -> list[Any]:
        """Everything needed to go on: a JSON header and the buffers."""
        header = {
            "version": STATE_VERSION,
            "config": self.config.to_dict(whole=True),
            "lengths": self._lengths,
            "encoded": self._encoded,
            "model": self._model,
            "item_size": self._item_size,
        }
        if any(self._dropped):
            header["dropped"] = self._dropped
        if self._held_from:
            header["held_from"] = self._held_from
        if self._keys is None or self._values is None:
            of_values = value_kind(self.config).count_arrays(self.config)
            nothing = [None] * (key_kind(self.config).n_arrays + of_values)
            return [json.dumps(header), *nothing]
        keys, *others = self._keys.arrays()
        header |= self._keys.header() | self._values.header()
        return [json.dumps(header), keys, *self._values.buffers, *others]

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
            header, buffers = modern_state(header, state[1:])
            self._begin(DeltaConfig.from_dict(header["config"]))
            self._restore(header, buffers)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"[{name}] not a saved state of this cache: {error}; make the prompt cache anew."
            ) from error
        if self._keys is not None:
            self._check_state(name)

    def _restore(self, header: Mapping[str, Any], buffers: list[Any]) -> None:
        """Take over a header and buffers, each of which is looked at by itself."""
        kind, of_values = key_kind(self.config), value_kind(self.config)
        end = 1 + of_values.count_arrays(self.config)
        if len(buffers) != end + kind.n_arrays - 1:
            raise ValueError(f"it has {len(buffers) + 1} parts")
        self._lengths, self._encoded = (spread(header[x], 1) for x in ("lengths", "encoded"))
        self._dropped = spread(header.get("dropped", [0]), 1)
        self._item_size, self._held_from = header["item_size"], header.get("held_from", 0)
        if all(x is None for x in buffers):
            return
        keys, values = [buffers[0], *buffers[end:]], buffers[1:end]
        if any(not isinstance(x, mx.array) for x in (keys[0], *values)) or header["model"] is None:
            raise ValueError("it lacks one of its buffers")
        if keys[0].ndim != 4:
            raise ValueError(f"its keys have shape {tuple(keys[0].shape)}")
        heads, head_dim, value_dim = (int(n) for n in header["model"])
        self._model = (heads, head_dim, value_dim)
        rows = keys[0].shape[0]
        self._lengths, self._encoded = spread(self._lengths, rows), spread(self._encoded, rows)
        self._dropped = spread(self._dropped, rows)
        self._keys = kind.restore(self.config, header, keys)
        if isinstance(self._keys, DenseKeys) and "sizes" in header:
            self._sizes = self._keys.sizes
        self._values = of_values.restore(self.config, header, values)

    def _check_state(self, name: str) -> None:
        """Refuse a state whose counts and buffers do not fit together."""
        assert self._keys is not None and self._values is not None
        B, H, _, head_dim = self._keys.arrays()[0].shape
        if (H, head_dim) != self._shape[:2] or len(self._lengths) != B:
            raise ValueError(
                f"[{name}] saved keys have shape {(B, H, '..', head_dim)} but the state is of "
                f"{len(self._lengths)} rows of a model of {self._model}."
            )
        if len(self._encoded) != B or len(self._dropped) != B:
            raise ValueError(f"[{name}] saved state has counts for different numbers of rows.")
        self.config.check_heads(H)
        dropping = Dropping.of(self.config)
        for length, gone in zip(self._lengths, self._dropped, strict=True):
            most = 0 if dropping is None else dropping.dropped(max(0, length))
            if not 0 <= gone <= most or (dropping is not None and gone % dropping.step):
                raise ValueError(f"[{name}] saved state counts {gone} dropped blocks of {length}.")
        lengths = stored(self._lengths, self._dropped, self.config.block_size)
        blocks = stored(self._encoded, self._dropped)
        room = self._keys.check(name, lengths, blocks)
        capacity = self._values.check(name, (B, H), room, lengths, blocks)
        for length, encoded, size in zip(lengths, blocks, self.block_sizes, strict=True):
            if length > capacity or not 0 <= encoded * size <= max(0, length):
                raise ValueError(
                    f"[{name}] saved state counts {length} tokens and {encoded} encoded blocks "
                    f"in a buffer of {capacity} tokens."
                )
