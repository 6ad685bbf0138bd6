"""The command in a terminal: Ctrl-C ends an answer and not the program, the prompt, colours."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Screen:
    """A program in a terminal of its own."""

    def __init__(self, *command: str, **environment: str):
        master, slave = pty.openpty()
        self._terminal = master
        variables = {"TERM": "xterm", "NO_COLOR": "", "INPUTRC": "/dev/null", **environment}
        self.process = subprocess.Popen(
            command,
            stdin=slave, stdout=slave, stderr=slave,
            cwd=ROOT, env={**os.environ, **variables}, start_new_session=True,
            preexec_fn=_begin,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self._terminal, text.encode())

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """What has come once the pattern is there."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"{pattern!r} did not come; there is {self.text!r}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._terminal, 4096).decode("utf-8", "replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.text), self.text
        return self.text

    def press(self, key: str, pattern: str) -> None:
        """Press a key until it shows.

        Python's readline does not see a signal that comes just before it waits for a key.
        """
        for _ in range(5):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.wait(pattern, 10)
                return
        self.wait(pattern, 0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def _begin() -> None:
    """In the new process: the terminal is its own, and Ctrl-C is heard, as in a shell."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background


@pytest.fixture
def screen(words_path):
    opened = Screen(
        sys.executable, "-m", "mlx_delta.chat", "--model", str(words_path), "-m", "1500"
    )
    yield opened
    opened.close()


def test_a_talk_in_a_terminal(screen, tmp_path):
    banner = screen.wait(r"Ctrl-D leaves[^>]*> ")
    assert "\x1b[" in banner and "context 2048 tokens" in banner
    screen.type("Hello\r")
    screen.wait(r"(?s)Hello\r\n.{20}")  # the answer has begun
    screen.type("\x03")
    screen.wait(r"stopped\][^>]*tokens; [^>]*> ")
    screen.type("half a message")
    screen.wait("half a message")
    screen.press("\x03", "interrupted; /quit or Ctrl-D leaves[^>]*> ")
    screen.type('"""\rline one\rline two"""\r')
    screen.wait(r'(?s)line two"""\r\n.{20}')  # the answer has begun
    screen.type("\x03")
    screen.wait(r"stopped\][^>]*tokens; [^>]*> ")
    file = tmp_path / "talk.json"
    screen.type(f"/save {file}\r")
    screen.wait("saved in ")
    assert "line one\\nline two" in file.read_text()
    screen.type("/sta\t\r")
    screen.wait("(?s)conversation: [0-9]+ tokens of 2048, 4 messages.*peak memory.*> ")
    screen.type("\x04")
    assert screen.process.wait(timeout=30) == 0
