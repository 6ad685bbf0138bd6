"""Reading a request within the time and the bytes that a client has for it."""

from __future__ import annotations

import io
import socket
import time
from typing import Any

LARGEST_HEAD = 256 << 10  # bytes; browsers and proxies send a few thousand


class HeadTooLargeError(Exception):
    """A request's head is longer than any that is meant."""


class TimelyReader(io.RawIOBase):
    """A connection's bytes, until a time is over.

    A socket's own timeout begins anew with each byte: a client that sends one at a time would keep
    its connection for hours.

    Args:
        connection: The socket, whose own timeout is for writing.
        seconds: For all that is read, from now on.
    """

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection = connection
        self._seconds = seconds
        self._left: int | None = LARGEST_HEAD
        self.begin()

    def begin(self) -> None:
        """Let the time begin anew."""
        self._end = time.monotonic() + self._seconds

    def begin_body(self) -> None:
        """Let the time begin anew for a body, whose length is known."""
        self._left = None
        self.begin()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes as they come.

        Raises:
            TimeoutError: The time is over.
            HeadTooLargeError: It is a head, and too long.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)
        try:
            got = self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._seconds)
        if self._left is not None:
            self._left -= got
            if self._left < 0:
                raise HeadTooLargeError
        return got
