"""A store of prefixes with the methods of mlx-lm's ``LRUPromptCache``, for its server and ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.models.cache import LRUPromptCache

from mlx_delta.cache import DeltaKVCache
from mlx_delta.cache.check_state import leaves
from mlx_delta.sensitivities import Sensitivities

from .chain import in_common, names, root
from .disk import PrefixDirectory
from .memory import Entry, PrefixMemory
from .pieces import Cut, Layout, Mark, build
from .raw import Piece

ALL = 1 << 63


@dataclass(frozen=True)
class _Found:
    """A place where a text of so many tokens can go on."""

    length: int
    names: list[str]
    mark: Mark | None = None
    entry: Entry | None = None  # in memory
    tail: tuple[Any, ...] = ()


class PrefixCache:
    """Prefixes of texts, in memory and on disk, from which a later text goes on exactly.

    Takes the place of mlx-lm's ``LRUPromptCache``: ``fetch_nearest_cache``, ``insert_cache``,
    ``trim_to``, ``stats_by_type``, ``nbytes`` and ``len``. Caches are cut into blocks; a text goes
    on where an earlier one ended or was marked, or within the last tokens of one, at any block's
    border where its setting needs no full keys there (``window=0``, mlx-lm's own caches), and
    nowhere else: what is fetched has the keys that an undisturbed run would have.

    At least the last token is left to be fed: its logits begin the answer. Caches that can't be cut
    (of other libraries, of a batch) are kept whole, in memory, by mlx-lm's own store.

    Args:
        max_size: Texts in memory at most.
        max_bytes: Bytes in memory at most.
        directory: Where prefixes last; ``None``: nowhere.
        identify: Gives a text for a model as callers of this store name it, the same for the same
            weights and setting (:func:`mlx_delta.prefixes.fingerprint`); prefixes of one
            for which it gives ``None`` stay in memory. A name that is a text stands for itself.
        make_caches: Gives the caches, still empty, that a text of so many tokens would start with;
            then prefixes of other settings are not fetched.
    """

    def __init__(
        self,
        max_size: int = 10,
        max_bytes: int = ALL,
        *,
        directory: PrefixDirectory | None = None,
        identify: Callable[[Any], str | None] | None = None,
        make_caches: Callable[[Any, int], Sequence[Any]] | None = None,
    ):
        self.max_size = max_size
        self.max_bytes = max_bytes
        self.directory = directory
        self._identify = identify or (lambda model: model if isinstance(model, str) else None)
        self._make_caches = make_caches
        self._memory = PrefixMemory()
        self._layouts: dict[Any, dict[str, Layout]] = {}
        self._others = LRUPromptCache(max_size, max_bytes)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Texts in memory."""
        return len(self._memory) + len(self._others)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._memory.nbytes + int(self._others.nbytes)

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Texts and bytes in memory, by what the texts end with."""
        with self._lock:
            own, others = self._memory.statistics(), self._others.stats_by_type()
        return {
            kind: {name: own[kind][name] + others[kind][name] for name in own[kind]} for kind in own
        }

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Keep so many texts and bytes in memory at most; what is on disk stays there."""
        texts = ALL if n_sequences is None else max(0, n_sequences)
        nbytes = ALL if n_bytes is None else max(0, n_bytes)
        with self._lock:
            self._others.trim_to(n_sequences=texts, n_bytes=nbytes)
            self._memory.shrink(texts - len(self._others), nbytes - int(self._others.nbytes))

    # Fetching.

    def fetch_nearest_cache(
        self, model: Any, tokens: Sequence[Any], like: Sequence[Any] | None = None
    ) -> tuple[list[Any] | None, list[Any]]:
        """Caches of the longest prefix from which the text goes on exactly.

        Args:
            model: The model's name.
            tokens: The text.
            like: Caches, still empty, of the setting that is wanted; as ``make_caches`` gives.

        Returns:
            Caches of one's own, or ``None`` if there are none; and the tokens still to be fed.
        """
        tokens = list(tokens)
        with self._lock:
            if like is None and self._make_caches is not None:
                like = self._make_caches(model, len(tokens))
            while (found := self._nearest(model, tokens, like)) is not None:
                caches = self._build(model, found)
                if caches is not None:
                    if like is not None:
                        _take_over(caches, like)
                    return self._longer(model, tokens, caches, found.length)
            return self._longer(model, tokens, None, 0)

    def _longer(
        self, model: Any, tokens: list[Any], caches: list[Any] | None, length: int
    ) -> tuple[list[Any] | None, list[Any]]:
        """These caches, or what mlx-lm's store has, if that is of more tokens."""
        others, rest = self._others.fetch_nearest_cache(model, tokens)
        if others is not None and (caches is None or len(tokens) - len(rest) > length):
            return others, list(rest)
        return caches, tokens[length:]

    def _known_layouts(self, model: Any, like: Sequence[Any] | None) -> list[Layout]:
        layouts = dict(self._layouts.get(model, {}))
        identity = self._identify(model)
        if self.directory is not None and identity is not None:
            layouts |= {layout.name: layout for layout in self.directory.layouts(identity)}
        wanted = None if like is None else _settings(like)
        return [x for x in layouts.values() if wanted is None or _alike(wanted, x.settings)]

    def _root(self, model: Any, layout: Layout) -> str:
        identity = self._identify(model)
        return root(f"model {identity}" if identity is not None else repr(model), layout.name)

    def _nearest(self, model: Any, tokens: list[Any], like: Sequence[Any] | None) -> _Found | None:
        """The longest way into the text."""
        best: _Found | None = None
        most = len(tokens) - 1
        for layout in self._known_layouts(model, like):
            size, disk = layout.size, self._on_disk(model)
            way: list[str] = []
            for name in names(self._root(model, layout), tokens, size):
                known = not way or self._memory.has_block(name)
                if not known and not (disk and disk[0].has_block(disk[1], layout, name)):
                    break
                way.append(name)
                base = len(way) - 1
                if layout.cuts_anywhere and 0 < base * size <= most:
                    best = _best(best, _Found(base * size, list(way)))
                places: list[tuple[Mark, tuple[Any, ...], Entry | None]]
                places = [(entry.mark, entry.tail, entry) for entry in self._memory.at(name)]
                if disk:
                    places += [(m, t, None) for m, t in disk[0].marks(disk[1], layout, name)]
                for mark, tail, entry in places:
                    common = base * size + in_common(tail, tokens[base * size :])
                    length = min(common, most)
                    if length and mark.exact_from <= length:
                        best = _best(best, _Found(length, list(way), mark, entry, tail))
        return best

    def known_blocks(
        self, model: Any, tokens: Sequence[Any], like: Sequence[Any] | None = None
    ) -> int:
        """How many of the first tokens stand in a text that was kept, up to a block's border.

        A text can't always go on from there (:meth:`fetch_nearest_cache`). Where it can't, that is
        a place for a mark: a third text may part from the other two just there.
        """
        most = 0
        with self._lock:
            for layout in self._known_layouts(model, like):
                disk = self._on_disk(model)
                way = names(self._root(model, layout), tokens, layout.size)
                next(way)
                for blocks, name in enumerate(way, 1):
                    if not self._memory.has_block(name):
                        if disk is None or not disk[0].has_block(disk[1], layout, name):
                            break
                    most = max(most, blocks * layout.size)
        return most

    def _on_disk(self, model: Any) -> tuple[PrefixDirectory, str] | None:
        identity = self._identify(model)
        if self.directory is None or identity is None:
            return None
        return self.directory, identity

    def _build(self, model: Any, found: _Found) -> list[Any] | None:
        """The caches of what was found; ``None`` if a block of it can't be used after all."""
        disk = self._on_disk(model)
        layout = self._layout_of(model, found)
        pieces: list[Piece] = []
        for name in found.names[1:]:
            piece = self._memory.block(name)
            if piece is None and disk is not None:
                piece = disk[0].read_block(disk[1], layout, name)
            if piece is None:
                return None
            pieces.append(piece)
        mark = found.mark
        if mark is not None and found.entry is None:
            assert disk is not None  # where else
            mark = disk[0].whole(disk[1], found.names[-1], mark, found.tail)
            if mark is None:
                return None
        try:
            caches = build(layout, pieces, mark, found.length)
        except ValueError as error:
            if disk is None or found.entry is not None:
                raise
            for name in found.names[1:]:
                disk[0].leave_block(disk[1], layout, name, error)
            return None
        if disk is not None:
            disk[0].use(disk[1], layout, found.names, found.tail if found.mark else None)
        if found.entry is not None:
            self._memory.use(found.entry)
        elif mark is not None:
            entry = Entry(model, found.names, found.tail, mark, "assistant", counts=True)
            self._keep(model, entry, pieces.__getitem__)
        return caches

    def _layout_of(self, model: Any, found: _Found) -> Layout:
        if found.mark is not None:
            return found.mark.layout
        layouts = self._known_layouts(model, None)
        return next(x for x in layouts if self._root(model, x) == found.names[0])

    # Inserting.

    def insert_cache(
        self,
        model: Any,
        tokens: Sequence[Any],
        prompt_cache: Sequence[Any],
        *,
        cache_type: str = "assistant",
        marks: Iterable[Mark] = (),
        end: bool = True,
    ) -> None:
        """Keep the caches of a text; they may be used and changed afterwards.

        Args:
            model: The model's name.
            tokens: The text; what the caches have not seen of it is left out.
            prompt_cache: Its caches, one for each layer.
            cache_type: What the text ends with: ``"assistant"``, ``"user"`` or ``"system"``; the
                first go first when memory is short.
            marks: Taken (:meth:`mark`) while the same caches were filled: other places at which a
                text can go on.
            end: Whether another text can go on where this one ends; otherwise at the marks only.
        """
        tokens = list(tokens)
        with self._lock:
            try:
                cut = Cut(prompt_cache)
            except TypeError:
                self._others.insert_cache(model, tokens, list(prompt_cache), cache_type=cache_type)
                self.trim_to(n_sequences=self.max_size, n_bytes=self.max_bytes)
                return
            tokens = tokens[: cut.length]
            way = list(names(self._root(model, cut.layout), tokens, cut.layout.size))
            kept: dict[int, Piece] = {}

            def block(i: int) -> Piece:
                if i not in kept:
                    kept[i] = cut.block(i)
                return kept[i]

            for mark in [*marks, cut.mark()] if end else marks:
                # Of tokens that are not given nobody knows what they were.
                if mark.layout != cut.layout or mark.length > len(tokens):
                    continue
                if mark.base > cut.blocks:
                    continue
                tail = tuple(tokens[mark.base * cut.layout.size : mark.length])
                is_end = mark.length == cut.length
                own = way[: mark.base + 1]
                entry = Entry(model, own, tail, mark, cache_type, counts=is_end)
                self._keep(model, entry, block)
                self._drop_beginnings(entry, tokens)
                disk = self._on_disk(model)
                if disk is not None:
                    disk[0].write(disk[1], own, mark, tail, block)

    def _drop_beginnings(self, entry: Entry, tokens: list[Any]) -> None:
        """Let go of texts that this one begins with, if they can be had from it."""
        layout = entry.mark.layout
        if not layout.cuts_anywhere or entry.mark.exact_from:
            return
        last = (len(entry.names) - 1) * layout.size
        for base, name in enumerate(entry.names):
            for other in list(self._memory.at(name)):
                length = other.mark.length
                begins = list(other.tail) == tokens[base * layout.size : length]
                if begins and length < entry.mark.length and (not other.tail or length >= last):
                    self._memory.remove(other)

    def _keep(self, model: Any, entry: Entry, block: Callable[[int], Piece]) -> None:
        """Take an entry into memory, and let go of what is too much."""
        layout = entry.mark.layout
        self._layouts.setdefault(model, {})[layout.name] = layout
        self._memory.put(entry, block)
        self.trim_to(n_sequences=self.max_size, n_bytes=self.max_bytes)

    @staticmethod
    def mark(caches: Sequence[Any]) -> Mark | None:
        """A place at which other texts can go on later: taken while a prompt is read.

        To be given to :meth:`insert_cache` together with the caches, once they are filled.

        Returns:
            ``None`` where caches can't be cut.
        """
        try:
            return Cut(caches).mark(slim=True)
        except TypeError:
            return None


def _best(best: _Found | None, found: _Found) -> _Found:
    """The longer one; of equal ones that which is in memory."""
    if best is None or found.length > best.length:
        return found
    if found.length == best.length and best.entry is None and found.entry is not None:
        return found
    return best


def _settings(caches: Sequence[Any]) -> list[Any]:
    """The setting of each cache, as a layout has it."""
    return [
        json.loads(json.dumps(cache.config.to_dict(whole=True)))
        if isinstance(cache, DeltaKVCache)
        else None
        for cache in leaves(caches)
    ]


def _alike(settings: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether settings are the same, but for the last digits of sensitivities.

    Those that are found while a model is loaded depend in these on how many threads there were.
    """

    def numbers(setting: Any) -> list[np.ndarray]:
        found = Sensitivities.from_dict(setting["sensitivities"])
        arrays = [*found.layers, *found.salience]
        return [np.zeros((1, 1), np.float32) if x is None else x for x in arrays]

    if len(settings) != len(others):
        return False
    for setting, other in zip(settings, others, strict=True):
        if setting == other:
            continue
        if setting is None or other is None or "sensitivities" not in setting:
            return False
        if {**setting, "sensitivities": 0} != {**other, "sensitivities": 0}:
            return False
        pairs = zip(numbers(setting), numbers(other), strict=True)
        if not all(a.shape == b.shape and np.allclose(a, b, rtol=1e-3) for a, b in pairs):
            return False
    return True


def _take_over(caches: Sequence[Any], like: Sequence[Any]) -> None:
    """What is known of a text besides its tokens."""
    for cache, new in zip(leaves(caches), leaves(like), strict=True):
        if isinstance(cache, DeltaKVCache):
            cache.prompt_length = new.prompt_length
