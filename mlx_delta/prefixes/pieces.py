"""The caches of a whole model in pieces: one for each block of a text, and one for where it ends.

A piece has the layers' arrays side by side, so that it is a few arrays whatever the number of
layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from mlx_lm.models.cache import CacheList

from mlx_delta.cache import length_of

from .leaves import HeldLeaf
from .other_leaves import PLAIN_SIZE, PlainLeaf, WholeLeaf
from .raw import Piece, piece_nbytes

_KINDS: dict[str, Any] = {"held": HeldLeaf, "plain": PlainLeaf}


@dataclass(frozen=True)
class Layout:
    """What is common to a model's caches of all texts: kinds, settings and shapes of its layers.

    Attributes:
        text: All of it, as JSON.
    """

    text: str

    @classmethod
    def of(cls, size: int, shape: Any, entries: Sequence[dict[str, Any]]) -> Layout:
        """The layout of caches in lists of this shape, cut into blocks of a size."""
        spec = {"version": 1, "size": size, "shape": shape, "leaves": list(entries)}
        return cls(json.dumps(spec, sort_keys=True))

    @cached_property
    def name(self) -> str:
        """A hash of it."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def spec(self) -> dict[str, Any]:
        """It, read."""
        spec: dict[str, Any] = json.loads(self.text)
        return spec

    @property
    def size(self) -> int:
        """Tokens in a block."""
        return int(self.spec["size"])

    @property
    def leaves(self) -> list[dict[str, Any]]:
        """An entry for each cache."""
        leaves: list[dict[str, Any]] = self.spec["leaves"]
        return leaves

    @cached_property
    def groups(self) -> list[list[int]]:
        """Which of the caches that can be cut have arrays of the same shapes."""
        groups: dict[str, list[int]] = {}
        for i, entry in enumerate(self.leaves):
            if entry["kind"] == "whole":
                continue
            told = dict(entry)
            config = told.pop("config", {})
            names = ("key_bits", "value_bits", "window", "sinks", "key_format", "value_format")
            told["how"] = [config.get(name) for name in names]
            groups.setdefault(json.dumps(told, sort_keys=True), []).append(i)
        return list(groups.values())

    @cached_property
    def settings(self) -> list[Any]:
        """The setting of each cache that holds keys, ``None`` for others."""
        return [entry.get("config") for entry in self.leaves]

    @cached_property
    def cuts_anywhere(self) -> bool:
        """Whether a text goes on exactly at every block's border, from its blocks alone."""
        return all(
            entry["kind"] == "plain" or (entry["kind"] == "held" and not entry["config"]["window"])
            for entry in self.leaves
        )

    def stack(self, leaves: dict[int, Piece]) -> Piece:
        """One piece of those of all caches that can be cut."""
        piece: Piece = {}
        for g, members in enumerate(self.groups):
            for name in leaves[members[0]]:
                parts = [leaves[i][name] for i in members]
                if name == "payload":  # whose length is every layer's own
                    piece[f"{g}.payload"] = np.concatenate(parts)
                    piece[f"{g}.words"] = np.array([len(part) for part in parts], np.int32)
                else:
                    piece[f"{g}.{name}"] = np.stack(parts)
        return piece

    def unstack(self, piece: Piece) -> dict[int, Piece]:
        """The pieces of single caches."""
        leaves: dict[int, Piece] = {i: {} for members in self.groups for i in members}
        for key, array in piece.items():
            g, _, name = key.partition(".")
            if not g.isdecimal() or name == "words":
                continue
            members = self.groups[int(g)]
            if name == "payload":
                ends = np.cumsum(piece[f"{g}.words"])
                parts = np.split(array, ends[:-1])
            else:
                parts = list(array)
            for i, part in zip(members, parts, strict=True):
                leaves[i][name] = part
        return leaves


@dataclass(frozen=True)
class Mark:
    """What a text needs, besides its first blocks, to go on exactly from its length.

    Attributes:
        layout: Of the caches.
        length: Tokens of the text.
        base: Blocks that are not part of it.
        first: Position of its first full key.
        exact_from: It can be cut at every length from this one on.
        piece: Full keys, and values, after the blocks; what can't be cut.
        forms: The states of caches that can't be cut, without their arrays; by number.
    """

    layout: Layout
    length: int
    base: int
    first: int
    exact_from: int
    piece: Piece
    forms: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return piece_nbytes(self.piece)


class Cut:
    """A model's caches, to be cut.

    Args:
        caches: One for each layer, all of one text.

    Raises:
        TypeError: One of them is of a kind that can't be kept in pieces.
    """

    def __init__(self, caches: Sequence[Any]):
        found: list[Any] = []
        self._shape = _shape_of(caches, found)
        held = [HeldLeaf.of(cache) for cache in found]
        first = next((leaf for leaf in held if leaf is not None), None)
        size = PLAIN_SIZE if first is None else first.size
        length = None if first is None else first.length
        self.leaves: list[Any] = []
        for cache, leaf in zip(found, held, strict=True):
            own: Any = leaf or PlainLeaf.of(cache, size)
            length = own.length if length is None and own is not None else length
            if own is not None and (own.size, own.length) != (size, length):
                own = None
            if leaf is not None and first is not None and leaf.blocks != first.blocks:
                own = None
            if own is None:
                if not WholeLeaf.fits(cache):
                    raise TypeError(f"a {type(cache).__name__} can't be kept in pieces")
                own = WholeLeaf(cache)
            self.leaves.append(own)
        self.length: int = length_of(caches) if length is None else length
        self._held = [leaf for leaf in self.leaves if isinstance(leaf, HeldLeaf)]
        self._whole = [i for i, x in enumerate(self.leaves) if isinstance(x, WholeLeaf)]
        self.blocks = self._held[0].blocks if self._held else self.length // size
        if len(self._whole) == len(self.leaves):
            self.blocks = 0
        self.layout = Layout.of(size, self._shape, [leaf.entry for leaf in self.leaves])

    def block(self, i: int) -> Piece:
        """What is stored of block ``i``."""
        members = [j for group in self.layout.groups for j in group]
        return self.layout.stack({j: self.leaves[j].block(i) for j in members})

    def mark(self, slim: bool = False) -> Mark:
        """What the text needs to go on from here.

        Args:
            slim: Whether it is to be cut here only, and not before: of the full keys only those
                that the next query sees. The block before them may have to be encoded first: such
                a mark is of use once the text has gone on.
        """
        layout, base = self.layout, self.blocks
        size = layout.size
        first = max([base * size if not self._held else 0, *(x.full_from for x in self._held)])
        exact_from = max([0, *(leaf.exact_from for leaf in self._held)])
        if slim and self._held:
            window = max(leaf.config.window_blocks for leaf in self._held)
            base = max(base, self.length // size - window)
            first, exact_from = base * size, self.length
        if self._whole:
            exact_from = self.length
        members = [j for group in layout.groups for j in group]
        piece = layout.stack({j: self.leaves[j].end(base, first) for j in members})
        forms = {}
        for i in self._whole:
            piece |= {f"whole{i}.{name}": x for name, x in self.leaves[i].end().items()}
            forms[str(i)] = self.leaves[i].form
        piece = {name: np.array(x) for name, x in piece.items()}  # the caches go on
        return Mark(layout, self.length, base, first, exact_from, piece, forms)


def build(layout: Layout, blocks: Sequence[Piece], mark: Mark | None, length: int) -> list[Any]:
    """The caches of a text.

    Args:
        layout: Of the caches.
        blocks: The text's first, as many as the mark does not hold.
        mark: At this length, or after it; ``None`` for a text of whole blocks.
        length: Tokens.

    Raises:
        ValueError: The pieces do not fit each other.
    """
    whole = len(blocks) * layout.size if mark is None else mark.length
    parts = [layout.unstack(block) for block in blocks]
    end = {} if mark is None else layout.unstack(mark.piece)
    first = whole if mark is None else mark.first
    leaves: list[Any] = []
    try:
        for i, entry in enumerate(layout.leaves):
            if entry["kind"] == "whole":
                assert mark is not None  # such a layout is not cut anywhere else
                prefix = f"whole{i}."
                own = {
                    name.removeprefix(prefix): x
                    for name, x in mark.piece.items()
                    if name.startswith(prefix)
                }
                leaves.append(WholeLeaf.build(entry, mark.forms[str(i)], own))
                continue
            kind = _KINDS[entry["kind"]]
            blocks_of = [part[i] for part in parts]
            last = end[i] if mark is not None else kind.nothing(entry, blocks_of[0])
            cache = kind.build(entry, blocks_of, last, first, whole)
            if length < whole:
                cache.trim(whole - length)
            leaves.append(cache)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"pieces of a prefix do not fit each other: {error}") from error

    return [_nested(x, leaves) for x in layout.spec["shape"]]


# Functions of their own: one within another that calls itself would keep the caches that it knows
# of in memory until Python looks for circles.


def _shape_of(caches: Sequence[Any], found: list[Any]) -> list[Any]:
    """How caches are nested, as numbers of those that are put into ``found``."""
    shapes: list[Any] = []
    for cache in caches:
        if isinstance(cache, CacheList):
            shapes.append(_shape_of(cache.caches, found))
        else:
            shapes.append(len(found))
            found.append(cache)
    return shapes


def _nested(shape: Any, leaves: Sequence[Any]) -> Any:
    """The caches of a shape."""
    if isinstance(shape, int):
        return leaves[shape]
    return CacheList(*(_nested(x, leaves) for x in shape))
