"""Which blocks are dropped when a cache may keep so many tokens only: a function of position alone.

The first block that holds sinks stays, and so do the newest ones. Between them the oldest go, a few
whole blocks at a time, always when the text comes to the same positions: so that what a query sees
does not depend on how a prompt was cut. What stays moves together; keys are rotated already, so
that attention minds their order only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_delta.config import DeltaConfig


@dataclass(frozen=True)
class Dropping:
    """How a setting with ``max_size`` drops blocks.

    Attributes:
        size: Tokens in a block.
        first: Blocks at the start that always stay.
        most: Blocks that are kept at most, the one being filled among them.
        step: Blocks that are dropped at a time.
    """

    size: int
    first: int
    most: int
    step: int

    @classmethod
    def of(cls, config: DeltaConfig) -> Dropping | None:
        """As a setting asks for; ``None``: nothing is dropped."""
        if config.max_size is None or config.block_fraction is not None:
            return None
        most = config.max_size // config.block_size
        first = -(-config.sinks // config.block_size)
        return cls(config.block_size, first, most, max(1, most // 8))

    def dropped(self, position: int) -> int:
        """Blocks that a query at a position does not see any more."""
        over = position // self.size - self.most + 1
        return 0 if over <= 0 else -(-over // self.step) * self.step

    def begins(self, dropped: int) -> int:
        """The first position at which so many blocks are dropped."""
        return 0 if not dropped else (dropped - self.step + self.most) * self.size

    def cuts(self, start: int, end: int) -> list[int]:
        """Positions in (start, end) at which blocks are dropped."""
        found = []
        while (position := self.begins(self.dropped(start) + self.step)) < end:
            found.append(position)
            start = position
        return found

    def left_from(self, block: int) -> int | None:
        """The position from which on a block is not seen any more; ``None`` if it always is."""
        if block < self.first:
            return None
        return self.begins(-(-(block - self.first + 1) // self.step) * self.step)

    def kept(self, blocks: int, dropped: int) -> list[int]:
        """Which of the text's first blocks are there."""
        if not dropped:
            return list(range(blocks))
        return [*range(self.first), *range(self.first + dropped, blocks)]


def stored(counts: Sequence[int], dropped: Sequence[int], size: int = 1) -> list[int]:
    """Counts of blocks (or of tokens, by their ``size``) less those that were dropped."""
    return [count - gone * size for count, gone in zip(counts, dropped, strict=True)]
