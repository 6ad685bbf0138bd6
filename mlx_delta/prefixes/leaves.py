"""Caches of held or coded keys of single layers, cut into blocks and what follows them.

They work on what a cache gives as its ``state``, so that what is put together again is checked as
a file's would be. Caches of other kinds: :mod:`mlx_delta.prefixes.other_leaves`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.cache import DeltaKVCache
from mlx_delta.cache.delta_log import PARTS as DELTA_PARTS
from mlx_delta.cache.delta_log import DeltaLog
from mlx_delta.cache.kinds import value_kind
from mlx_delta.cache.payload_log import LEAST_BLOCKS
from mlx_delta.cache.state import STATE_VERSION

from .raw import Piece, from_raw, no_tokens, padded, to_raw, type_name


class HeldLeaf:
    """A cache of held keys of one text.

    Attributes:
        entry: What all blocks of all texts have in common, as JSON values.
        length: Tokens.
        blocks: How many are encoded.
        full_from: Position from which on full keys are at hand.
        exact_from: The text can be cut at every length from this one on.
    """

    def __init__(self, cache: DeltaKVCache):
        header, *arrays = cache.state
        self.header = json.loads(header)
        self.config = cache.config
        self.length = cache.offset
        (self.blocks,) = cache.encoded
        self.exact_from = cache.offset - cache.exact_trim()
        end = 1 + value_kind(cache.config).count_arrays(cache.config)
        keys = [arrays[0], *arrays[end:]]
        names = ["keys", "zeros", "spare"]
        if cache.config.key_format == "codes":
            names = ["near", "codes", "grid", "sinks"]
        elif cache.config.key_format == "deltas":
            names = ["near", "payload", *DELTA_PARTS, "sinks"]
        found = dict(zip(names, keys, strict=True))
        values = arrays[1:end]
        if cache.config.value_format == "rotated":
            *values, found["near_values"], found["value_sinks"] = values
        found |= {f"values{i}": x for i, x in enumerate(values)}
        found = {name: x for name, x in found.items() if x is not None}
        mx.eval(list(found.values()))
        self.arrays = {name: to_raw(x) for name, x in found.items()}
        self.entry = {
            "kind": "held",
            "config": self.header["config"],
            "model": self.header["model"],
            "item_size": self.header["item_size"],
            "type": self.header.get("type"),
            "types": {name: type_name(x) for name, x in found.items()},
        }
        if "codes" in found:
            self.entry["rows"] = found["codes"].shape[2]
        if "near_values" in found:
            self.entry["columns"] = found["values0"].shape[3]
        self.full_from = self._full_from()

    @staticmethod
    def of(cache: Any) -> HeldLeaf | None:
        """The cache in a form that can be cut; ``None`` if it is no such cache of one text."""
        if type(cache) is not DeltaKVCache or cache.empty() or len(cache.lengths) != 1:
            return None
        if cache.config.block_fraction is not None or cache.held_from:
            return None  # its first queries saw other keys than those of any other text
        if any(cache.dropped):
            return None  # its first blocks are gone
        leaf = HeldLeaf(cache)
        fits = leaf.full_from <= leaf.blocks * leaf.size and leaf._stored() == leaf.blocks
        return leaf if fits else None

    @property
    def size(self) -> int:
        """Tokens in a block."""
        return self.config.block_size

    def _stored(self) -> int:
        """Blocks that are held or coded."""
        if self.config.key_bits is None:
            return int(self.header["held"][0])
        if self.config.key_format == "codes":
            return int(self.header["coded"][0])
        return int(self.header["stored"][0])

    def _full_from(self) -> int:
        if self.config.key_bits is None:
            return (self._stored() - self.header["spare_valid"][0]) * self.size
        return max(self.header["firsts"][0], self.header["lost"][0] * self.size)

    def block(self, i: int) -> Piece:
        """What is stored of block ``i``."""
        span = slice(i * self.size, (i + 1) * self.size)
        piece = {n: x[0, :, span] for n, x in self.arrays.items() if n.startswith("values")}
        for name in ("sinks", "value_sinks"):
            if name in self.arrays and span.start < self.config.sinks:
                piece[name] = self.arrays[name][0, :, span]
        if self.config.key_format == "codes":
            return piece | {
                "codes": self.arrays["codes"][0, i],
                "grid": self.arrays["grid"][0, :, i],
            }
        if self.config.key_format == "deltas":
            piece |= {name: self.arrays[name][0, :, i] for name in DELTA_PARTS}
            words = self.arrays["counts"][0].sum(axis=0)
            begin = int(words[:i].sum())
            piece["payload"] = self.arrays["payload"][0, begin : begin + int(words[i])]
            return piece
        piece["zeros"] = self.arrays["zeros"][0, :, i]
        return {**piece, "keys": self.arrays["keys"][0, :, span]}

    def end(self, base: int, first: int) -> Piece:
        """Full keys from position ``first`` on, and values from block ``base`` on."""
        piece = {
            name: x[0, :, base * self.size : self.length]
            for name, x in self.arrays.items()
            if name.startswith("values")
        }
        if self.config.key_bits is None:
            border = self._stored() * self.size
            near = self.arrays["keys"][0, :, border : self.length]
            if first < border:
                spare = self.arrays["spare"][0, :, first - border :]
                near = np.concatenate([spare, near], axis=1)
            else:
                near = near[:, first - border :]
        else:
            begin = self.header["firsts"][0]
            near = self.arrays["near"][0, :, first - begin : self.length - begin]
        if "near_values" in self.arrays:
            begin = self.header["value_firsts"][0]
            own = self.arrays["near_values"][0, :, first - begin : self.length - begin]
            piece["near_values"] = own
        return {**piece, "near": near}

    @staticmethod
    def nothing(entry: dict[str, Any], block: Piece) -> Piece:
        """An end without tokens, of the same shapes as a block."""
        end = {name: x[:, :0] for name, x in block.items() if name.startswith("values")}
        if "keys" in block:
            return {**end, "near": block["keys"][:, :0]}
        heads, head_dim, value_dim = entry["model"]
        if "near_values" in entry["types"]:
            end["near_values"] = no_tokens((heads, 0, value_dim), entry["types"]["near_values"])
        return {**end, "near": no_tokens((heads, 0, head_dim), entry["types"]["near"])}

    @staticmethod
    def build(
        entry: dict[str, Any], blocks: Sequence[Piece], end: Piece, first: int, length: int
    ) -> DeltaKVCache:
        """The cache of blocks, and of what follows them.

        Args:
            entry: As of the leaf.
            blocks: From the text's first on.
            end: As :meth:`end` gave it, with the number of blocks as its base.
            first: As for it.
            length: Tokens of the text.

        Raises:
            ValueError: They are of a form that is gone, or do not fit each other.
        """
        config, types = entry["config"], entry["types"]
        if "masks" in types:
            raise ValueError("its keys are packed, as earlier versions did")
        size, bits = config["block_size"], config.get("key_bits")
        step = DeltaKVCache.step
        capacity = -(-length // step) * step
        header = {
            "version": STATE_VERSION,
            "config": config,
            "lengths": [length],
            "encoded": [len(blocks)],
            "model": entry["model"],
            "item_size": entry["item_size"],
        }
        made: dict[str, mx.array] = {}

        def put(name: str, array: np.ndarray) -> None:
            made[name] = from_raw(array[None], types[name])

        values = sorted(name for name in types if name.startswith("values"))
        for name in values:
            parts = [*(block[name] for block in blocks), end[name]]
            put(name, padded(np.concatenate(parts, axis=1), capacity, 1))
        near = end["near"]
        heads, _, head_dim = near.shape
        if bits is None:
            border = len(blocks) * size
            keys = [*(block["keys"] for block in blocks), near[:, border - first :]]
            put("keys", padded(np.concatenate(keys, axis=1), capacity, 1))
            zeros = np.zeros((heads, -(-capacity // size)), np.int32)
            if blocks:
                zeros[:, : len(blocks)] = np.stack([block["zeros"] for block in blocks], axis=1)
            put("zeros", zeros)
            spare = np.zeros((heads, size, head_dim), near.dtype)
            if first < border:
                spare[:] = near[:, :size]
            put("spare", spare)
            header |= {"held": [len(blocks)], "spare_valid": [first < border]}
            order = ["keys", *values, "zeros", "spare"]
            return _from_state(header, [made[name] for name in order])
        window = config["window"] // size
        put("near", padded(near, (window + 2) * size, 1))
        header |= {"firsts": [first], "lost": [first // size], "type": entry["type"]}
        if "near_values" in types:
            put("near_values", padded(end["near_values"], (window + 2) * size, 1))
            header |= {"value_firsts": [first], "coded_values": [len(blocks)]}
            values += ["near_values", "value_sinks"]
        for name, full in (("sinks", "near"), ("value_sinks", "near_values")):
            if name in types:
                known = len(blocks) * size
                put(name, _first_tokens(name, blocks, end[full], first, known, config))
        if "codes" in types:
            words = [np.zeros((0, entry["rows"], size), np.uint32)]
            put("codes", np.concatenate([*words, *(block["codes"][None] for block in blocks)]))
            grids = [np.zeros((heads, 0, 2, head_dim), near.dtype)]
            grids += [block["grid"][:, None] for block in blocks]
            put("grid", np.concatenate(grids, axis=1))
            header["coded"] = [len(blocks)]
            order = ["near", *values, "codes", "grid", "sinks"]
            return _from_state(header, [made.get(name) for name in order])
        room = max(LEAST_BLOCKS, len(blocks))
        per_block: dict[str, tuple[tuple[int, ...], Any]] = {
            "counts": ((heads,), np.int32),
            "low": ((heads, head_dim), near.dtype),
            "steps": ((heads, head_dim), np.uint8),
            "zeros": ((heads,), np.int32),
            "sequence": ((heads, size), np.uint8),
        }
        for name, (shape, dtype) in per_block.items():
            whole = np.zeros((shape[0], room, *shape[1:]), dtype)
            if blocks:
                whole[:, : len(blocks)] = np.stack([block[name] for block in blocks], axis=1)
            put(name, whole)
        spare = np.zeros(DeltaLog.spare, np.uint32)
        put("payload", np.concatenate([*(b["payload"] for b in blocks), spare]))
        header["stored"] = [len(blocks)]
        order = ["near", *values, "payload", *DELTA_PARTS, "sinks"]
        return _from_state(header, [made.get(name) for name in order])


def _first_tokens(
    name: str,
    blocks: Sequence[Piece],
    near: np.ndarray,
    first: int,
    known: int,
    config: dict[str, Any],
) -> np.ndarray:
    """Exact keys or values of the first tokens, [Hkv, n_sinks, D].

    Args:
        name: Theirs, in blocks.
        blocks: From the text's first on.
        near: Full ones from position ``first`` on.
        first: At most ``known``.
        known: Tokens of the blocks.
        config: The setting.
    """
    count = config["sinks"]
    found = np.zeros((near.shape[0], count, near.shape[2]), near.dtype)
    parts = [near[:, :0], *(block[name] for block in blocks if name in block)]
    if known < count:
        parts.append(near[:, known - first : count - first])
    tokens = np.concatenate(parts, axis=1)
    found[:, : tokens.shape[1]] = tokens
    return found


def _from_state(header: dict[str, Any], buffers: list[Any]) -> DeltaKVCache:
    return DeltaKVCache.from_state([json.dumps(header), *buffers])
