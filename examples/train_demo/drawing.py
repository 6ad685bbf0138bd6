"""Processes that draw batches ahead, into memory they share with the trainer. Needs no torch.

Drawing a batch takes longer than a GPU takes to train on it, so several are drawn at once. They are
forked, before CUDA starts, so that the text is in memory once.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from data import Batches, Mix

SHORTEST = 64  # a sequence; its batch has the most rows, each a token longer than the sequence
PATIENCE = 60  # seconds for a batch; after them, a process that ended is looked for
SILENT, ANSWER = 1, 2  # in the mask


class Drawers:
    """Draws batches in processes, up to `slots` of them ahead.

    Args:
        batches: What draws one.
        stages: What they may be made of; `order` names one by its index.
        max_length: The longest sequence.
        processes: How many there are.
        slots: Room for batches that are being drawn or wait.
    """

    def __init__(
        self, batches: Batches, stages: list[Mix], max_length: int, processes: int, slots: int
    ):
        tokens = batches.tokens_per_step
        self.size = max(tokens + tokens // SHORTEST, max_length + 1)
        fork = multiprocessing.get_context("fork")
        self.ids = np.frombuffer(fork.RawArray("H", slots * self.size), np.uint16)
        self.masks = np.frombuffer(fork.RawArray("B", slots * self.size), np.uint8)
        self.free, self.ordered, self.under_way = list(range(slots)), 0, 0
        self.jobs, self.drawn = fork.Queue(), fork.Queue()
        self.crew = [
            fork.Process(target=self._draw, args=(batches, stages), daemon=True)
            for _ in range(processes)
        ]
        for process in self.crew:
            process.start()

    def order(self, stage: int, ahead: int) -> None:
        """Have batches drawn until `ahead` are under way; few, so that a new stage begins soon."""
        while self.free and self.under_way < ahead:
            self.jobs.put((self.free.pop(), stage, self.ordered))
            self.ordered += 1
            self.under_way += 1

    def _draw(self, batches: Batches, stages: list[Mix]) -> None:
        """What a process does: draw what is ordered, until it is stopped."""
        while True:
            slot, stage, step = self.jobs.get()
            try:
                ids, silent, answers = batches.draw(stages[stage], step)
            except Exception as error:  # the trainer is to know, not to wait
                self.drawn.put((slot, f"{type(error).__name__}: {error}"))
                return
            start, end = slot * self.size, slot * self.size + ids.size
            self.ids[start:end] = ids.ravel()
            mask = np.zeros(ids.shape, np.uint8)  # of the row's own tokens: the first is no target
            mask[:, 1:] = silent * SILENT + answers * ANSWER
            self.masks[start:end] = mask.ravel()
            self.drawn.put((slot, ids.shape))

    @contextmanager
    def batch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The next batch, whichever is ready: ids and masks [B, T + 1], valid inside the `with`.

        Raises:
            RuntimeError: It could not be drawn, or a process ended.
        """
        slot, shape = self._next()
        part = slice(slot * self.size, slot * self.size + shape[0] * shape[1])
        yield self.ids[part].reshape(shape), self.masks[part].reshape(shape)
        self.free.append(slot)

    def _next(self) -> tuple[int, tuple[int, int]]:
        while True:
            try:
                slot, shape = self.drawn.get(timeout=PATIENCE)
            except queue.Empty:
                ended = [process.exitcode for process in self.crew if not process.is_alive()]
                if ended:
                    raise RuntimeError(f"a drawing process ended with {ended[0]}") from None
                continue
            self.under_way -= 1
            if isinstance(shape, str):
                raise RuntimeError(f"a batch could not be drawn: {shape}")
            return slot, shape

    def stop(self) -> None:
        """End the processes."""
        for process in self.crew:
            process.terminate()
