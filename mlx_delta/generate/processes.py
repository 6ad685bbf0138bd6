"""One generation in several processes, of ``mlx.launch``: all compute, the first one speaks."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream


class Processes:
    """The processes that were launched together; mostly a single one."""

    def __init__(self) -> None:
        self._group = mx.distributed.init()

    @property
    def size(self) -> int:
        """How many there are."""
        return self._group.size()

    @property
    def first(self) -> bool:
        """Whether this is the one that reads and prints."""
        return self._group.rank() == 0

    def check_flags(self, args: argparse.Namespace) -> None:
        """Refuse what works in one process only.

        Raises:
            ValueError: Which flag.
        """
        if self.size == 1:
            if args.pipeline:
                raise ValueError(
                    "--pipeline needs several processes: mlx.launch -n 2 ... starts them."
                )
            return
        for name in (
            *("adapter_path", "draft_model", "prompt_cache_file", "save_prompt_cache", "compare"),
            *("max_kv_size", "kv_bits"),
        ):
            if getattr(args, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} does not go together with several processes; "
                    "drop it."
                )

    def groups(self, args: argparse.Namespace) -> dict[str, Any]:
        """What :func:`mlx_delta.load` needs to know of them."""
        if self.size == 1:
            return {}
        return {"pipeline_group" if args.pipeline else "tensor_group": self._group}

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Let only the first process print; an error is raised in each that meets it."""
        if self.first:
            with self._heard():
                yield
            return
        with (
            self._heard(),
            open(os.devnull, "w", encoding="utf-8") as nothing,
            contextlib.redirect_stdout(nothing),
            contextlib.redirect_stderr(nothing),
        ):
            yield

    def share_text(self, read: Callable[[], str]) -> str:
        """The text that the first process reads, in all.

        Raises:
            SystemExit: Another than the first, where that one could not read it.
        """
        if self.size == 1:
            return read()
        data = b""
        if self.first:
            try:
                data = read().encode("utf-8")
            except BaseException:
                self._from_first(mx.array(-1, mx.int32))
                raise
        length = int(self._from_first(mx.array(len(data), mx.int32)))
        if length < 0:
            raise SystemExit(1)
        own = mx.array(np.frombuffer(data, np.uint8)) if self.first else mx.zeros(length, mx.uint8)
        return self._from_first(own).tobytes().decode("utf-8")

    def share_number(self, number: int) -> int:
        """The first process's number, of 32 bits, in all."""
        if self.size == 1:
            return number
        return int(self._from_first(mx.array(number, mx.uint32)))

    def of_each(self, number: int) -> list[int]:
        """Every process's number, of 62 bits."""
        if self.size == 1:
            return [number]
        halves = np.zeros((self.size, 2), np.int32)
        halves[self._group.rank()] = number >> 31, number & 0x7FFFFFFF
        return [int(high) << 31 | int(low) for high, low in self._sum(mx.array(halves))]

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """Say in one line that another process is gone, wherever it is missed."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or "peer" not in str(error):
                raise
            raise OSError(f"another of the {self.size} processes has ended ({error}).") from error

    def _from_first(self, array: mx.array) -> np.ndarray:
        return self._sum(array if self.first else mx.zeros_like(array))

    def _sum(self, array: mx.array) -> np.ndarray:
        # On the stream that generation is on, which may still be computing a token that nobody
        # takes: on two streams at once processes would take one message for another.
        with mx.stream(generation_stream):
            return np.array(mx.distributed.all_sum(array, group=self._group))
