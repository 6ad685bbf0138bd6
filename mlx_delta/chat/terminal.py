"""Where a chat is read from and shown: a terminal, or a pipe, where only answers go to stdout."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from .whole import harmless

QUOTE = '"""'  # begins and ends a message of several lines

_STYLES = {"dim": "2", "bold": "1", "error": "31", "prompt": "1;36"}


class Terminal:
    """Reads messages and shows answers.

    Args:
        words: What the Tab key completes at the beginning of a line.

    Attributes:
        interactive: Whether somebody types.
        colours: Whether the output shows them.
    """

    def __init__(self, words: Sequence[str] = ()):
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self.colours = _shows_colours()
        self._to_terminal = sys.stdout.isatty()
        self._readline = _load_readline(words) if self.interactive and self._to_terminal else None
        self._at_line_start = True
        if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
            # Bytes that are no text: to be told of, not to end the program.
            sys.stdin.reconfigure(errors="surrogateescape")

    # Reading.

    def read(self, begin: str = "") -> tuple[str, bool] | None:
        """The next message and whether it may be a command; ``None`` at the end of the input.

        A line that begins with three quotes begins a message that ends with three quotes; a
        backslash at the end of a line lets the next one belong to it.

        Args:
            begin: What stands in the line already, to be edited.

        Raises:
            ValueError: It is no text.
            KeyboardInterrupt: Ctrl-C.
        """
        line = self._line("> ", begin)
        if line is None:
            return None
        quoted = line.lstrip().startswith(QUOTE)
        if quoted:
            text = self._quoted(line.lstrip().removeprefix(QUOTE))
        else:
            text = self._continued(line)
        try:
            text.encode("utf-8")
        except UnicodeError as error:
            raise ValueError("that was not UTF-8 text; it is left out.") from error
        return text, not quoted

    def _quoted(self, first: str) -> str:
        lines = [first]
        while QUOTE not in lines[-1]:
            line = self._line(". ")
            if line is None:
                break
            lines.append(line)
        lines[-1] = lines[-1].partition(QUOTE)[0]
        return "\n".join(lines).strip("\n")

    def _continued(self, line: str) -> str:
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._line(". ")
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def _line(self, prompt: str, begin: str = "") -> str | None:
        if sys.stdin is None or sys.stdin.closed:
            return None
        if self._readline is None:
            if self.interactive:  # the output goes elsewhere
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        if begin:
            self._readline.set_startup_hook(lambda: self._insert(begin))
        try:
            # What readline does not count as width stands between 1 and 2.
            return input(f"\x01{self._code('prompt')}\x02{prompt}\x01{self._code()}\x02")
        except EOFError:
            print()
            return None
        finally:
            self._readline.set_startup_hook(None)

    def _insert(self, text: str) -> None:
        if self._readline is not None:
            self._readline.insert_text(text)

    # Showing.

    def show(self, piece: str) -> None:
        """A piece of an answer; on a terminal without what would move its cursor."""
        if not piece:
            return
        piece = harmless(piece) if self._to_terminal else piece
        print(piece, end="", flush=True)
        self._at_line_start = piece.endswith("\n")

    def end_line(self) -> None:
        """End the line that an answer left open."""
        if not self._at_line_start:
            print(flush=True)
        self._at_line_start = True

    def say(self, text: str, style: str = "dim") -> None:
        """A word of the program's own: beside the answers, or where errors go in a pipe."""
        stream = sys.stdout if self.interactive and self._to_terminal else sys.stderr
        colours = self.colours and stream is sys.stdout
        text = harmless(text)
        print(f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colours else text, file=stream, flush=True)

    def tell(self, text: str) -> None:
        """What a command was asked for: to the terminal, and in a pipe where answers go."""
        print(harmless(text) if self._to_terminal else text, flush=True)

    def progress(self, done: int, total: int) -> None:
        """How much of a long message is read, in a line that the answer replaces."""
        if self._to_terminal and self.interactive and total > 2048:
            text = "" if done >= total else f"reading: {done} of {total} tokens"
            print(f"\r\x1b[K{text}" if self.colours else "", end="", flush=True)

    def _code(self, style: str | None = None) -> str:
        if not self.colours:
            return ""
        return "\x1b[0m" if style is None else f"\x1b[{_STYLES[style]}m"


@contextlib.contextmanager
def stopped_by_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call ``stop``; a second one interrupts at once, wherever the program is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _shows_colours() -> bool:
    """Whether the output is a terminal that is to show colours (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "") in ("dumb", "")
    return sys.stdout.isatty() and not plain


def _load_readline(words: Sequence[str]) -> ModuleType | None:
    """Editing of lines, their history, completion of commands, and pasting of several lines."""
    try:
        import readline
    except ImportError:  # not in every Python
        return None

    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if text and word.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline
