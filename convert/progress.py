"""A progress line with bytes and the time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from .files import format_bytes

BAR = 24
# Seconds between two lines where the line can't be redrawn (a log file).
LOG_INTERVAL = 10.0


class Progress:
    """Counts bytes; draws a bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None, quiet: bool = False):
        self._label, self._total = label, max(total, 1)
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._terminal = self._stream.isatty()
        self._done = 0
        self._start = self._drawn = time.monotonic()

    def add(self, count: int, skipped: bool = False) -> None:
        """Count bytes; ``skipped`` ones were done by an earlier run and took no time."""
        self._done += count
        if skipped:
            self._total -= count
            self._done -= count
            return
        now = time.monotonic()
        if not self._quiet and now - self._drawn >= (0.1 if self._terminal else LOG_INTERVAL):
            self._drawn = now
            self._draw(now)

    def _draw(self, now: float) -> None:
        done = min(self._done / max(self._total, 1), 1.0)
        rate = self._done / max(now - self._start, 1e-6)
        left = (self._total - self._done) / max(rate, 1.0)
        bar = "#" * round(done * BAR)
        line = (
            f"{self._label} [{bar:.<{BAR}}] {done:4.0%}  {format_bytes(self._done)} of "
            f"{format_bytes(self._total)}  {format_bytes(rate)}/s  {left:.0f} s left"
        )
        self._stream.write(f"\r{line}\033[K" if self._terminal else line + "\n")
        self._stream.flush()

    def finish(self) -> None:
        """Remove the bar."""
        if self._terminal and not self._quiet:
            self._stream.write("\r\033[K")
            self._stream.flush()
