"""Prefixes in memory: blocks that texts share are there once, and counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from .pieces import Mark
from .raw import Piece, piece_nbytes

Tail = tuple[Any, ...]
Key = tuple[str, Tail]  # the name of a text's last block, and the tokens after it


@dataclass
class Entry:
    """A place where a text can go on.

    Attributes:
        model: Of the text, as the caller calls it.
        names: Of the text without tokens, and up to each of its blocks.
        tail: Tokens after the blocks.
        mark: What it needs.
        cache_type: mlx-lm's word for what the text ends with.
        counts: Whether it is a text that was put in, rather than a place within one.
    """

    model: Any
    names: list[str]
    tail: Tail
    mark: Mark
    cache_type: str
    counts: bool

    @property
    def key(self) -> Key:
        """What it is found by."""
        return self.names[-1], self.tail


class PrefixMemory:
    """Blocks and marks of texts, the latest used ones last."""

    def __init__(self) -> None:
        self._blocks: dict[str, Piece] = {}
        self._users: dict[str, int] = {}
        self._entries: dict[Key, Entry] = {}
        self._at: dict[str, dict[Tail, Entry]] = {}
        self._order = LRUPromptCache.CacheOrder()
        self.nbytes = 0

    def __len__(self) -> int:
        """Texts that were put in."""
        return sum(entry.counts for entry in self._entries.values())

    def has_block(self, name: str) -> bool:
        """Whether a block is here."""
        return name in self._blocks

    def block(self, name: str) -> Piece | None:
        """A block."""
        return self._blocks.get(name)

    def at(self, name: str) -> Iterator[Entry]:
        """Entries of texts that begin with the blocks up to ``name``."""
        yield from self._at.get(name, {}).values()

    def entries(self) -> Iterator[Entry]:
        """All of them."""
        yield from self._entries.values()

    def put(self, entry: Entry, block: Callable[[int], Piece]) -> None:
        """Take a text in; ``block`` gives those of its blocks that are not here."""
        old = self._entries.get(entry.key)
        if old is not None:
            entry.counts |= old.counts
            self.remove(old)
        for i, name in enumerate(entry.names[1:]):
            if name not in self._blocks:
                self._blocks[name] = block(i)
                self._users[name] = 0
                self.nbytes += piece_nbytes(self._blocks[name])
            self._users[name] += 1
        self._entries[entry.key] = entry
        self._at.setdefault(entry.names[-1], {})[entry.tail] = entry
        self.nbytes += entry.mark.nbytes
        self._order.push(entry.names[-1], list(entry.tail), entry.cache_type)

    def use(self, entry: Entry) -> None:
        """Make an entry the latest used one."""
        self._order.remove(entry.names[-1], list(entry.tail))
        self._order.push(entry.names[-1], list(entry.tail), entry.cache_type)

    def remove(self, entry: Entry) -> None:
        """Let go of an entry, and of blocks that no other has."""
        del self._entries[entry.key]
        tails = self._at[entry.names[-1]]
        del tails[entry.tail]
        if not tails:
            del self._at[entry.names[-1]]
        self._order.remove(entry.names[-1], list(entry.tail))
        self.nbytes -= entry.mark.nbytes
        for name in entry.names[1:]:
            self._users[name] -= 1
            if not self._users[name]:
                self.nbytes -= piece_nbytes(self._blocks.pop(name))
                del self._users[name]

    def shrink(self, texts: int, nbytes: int) -> None:
        """Remove the entries that were not used for longest, as mlx-lm orders them."""
        while self._entries and (len(self) > texts or self.nbytes > nbytes):
            name, tail = self._order.pop()
            self._order.push(name, tail)  # ``remove`` takes it out again
            self.remove(self._entries[name, tuple(tail)])

    def statistics(self) -> dict[str, dict[str, int]]:
        """Texts and bytes by type; shared blocks count for the first text that has them."""
        found = {kind: {"n_sequences": 0, "n_bytes": 0} for kind in _KINDS}
        seen: set[str] = set()
        for entry in self._entries.values():
            numbers = found[entry.cache_type]
            numbers["n_sequences"] += entry.counts
            numbers["n_bytes"] += entry.mark.nbytes
            for name in entry.names[1:]:
                if name not in seen:
                    seen.add(name)
                    numbers["n_bytes"] += piece_nbytes(self._blocks[name])
        return found


_KINDS: Sequence[str] = ("assistant", "user", "system")
