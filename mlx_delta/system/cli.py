"""What the command lines share: help, output on any terminal, errors in a line, exit status."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from mlx_delta.wording import nearest

# What stands for characters of our tables and messages where a terminal has ASCII only.
_PLAIN = {"±": "+-", "–": "-", "—": "-", "×": "x", "θ": "t", "ᵀ": "^T", "…": "...", "’": "'"}
_PLAIN |= {"“": '"', "”": '"'}

_USUAL = warnings.formatwarning


class HelpFormatter(argparse.HelpFormatter):
    """Help that says each option's default, where its text does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        none = action.default in (None, (), [], argparse.SUPPRESS) or action.nargs == 0
        if text is None or none or "default" in text.lower():
            return text
        return f"{text}{'' if text.endswith('.') else '.'} Default: %(default)s."


class Parser(argparse.ArgumentParser):
    """argparse's, but for flags that can't be used: one line, and the nearest ones there are."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with status 2."""
        plain_output()
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        hint = nearest(unknown[1], self._option_string_actions) if unknown else ""
        self.exit(2, f"error: {message}{hint}; `{self.prog} --help` lists the flags.\n")


def plain_output() -> None:
    """Let the terminal show what it can: no character that it lacks ends a command."""
    codecs.register_error("mlx_delta.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        # Streams that are not Python's own (in a notebook, a test) take all characters.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="mlx_delta.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that can't be encoded; a codec's error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lacking), error.end


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning as it is shown: of our own the words, without the place in the code."""
    if category is UserWarning and str(message).startswith("["):
        return f"note: {message}\n"
    return _USUAL(message, category, filename, lineno, line)


def run_command(run: Callable[[], None], smaller: str, interrupted: str = "Interrupted.") -> int:
    """Run a command's work.

    Args:
        run: The work. What a user can do something about it raises as ValueError, OSError,
            MemoryError or NotImplementedError, whose message is all that is printed.
        smaller: What to ask less of when memory runs out.
        interrupted: What to say after Ctrl-C.

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    plain_output()
    warnings.formatwarning = _note
    # It warns of texts beyond the context, for which the commands have words of their own.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        run()
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1  # whoever read our output has gone: nobody to tell
    except (ValueError, OSError, MemoryError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "home directory" in str(error):  # of Path.expanduser
            print("error: a path begins with ~ and a name that no user has.", file=sys.stderr)
            return 1
        if "memory" not in str(error).lower():
            raise
        # What MLX raises when the GPU can't hold any more.
        print(f"error: out of memory ({error}); {smaller}.", file=sys.stderr)
        return 1
    return 0
