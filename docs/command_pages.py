"""A hook of mkdocs: fills docs/commands.md with what each command's ``--help`` says."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

COMMANDS = ("generate", "chat", "cache_prompt", "server", "convert")
COMMANDS += ("evaluate", "calibrate", "benchmark", "pictures")
MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the help of every command in the place of the mark."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, "\n\n".join(section(command) for command in COMMANDS))


def section(command: str) -> str:
    """A heading, and the command's own words."""
    return f"## {command}\n\n```text\n{command_help(command)}\n```"


def command_help(command: str) -> str:
    """What ``python -m mlx_delta.<command> --help`` prints, 100 columns wide.

    Raises:
        subprocess.CalledProcessError: The command fails.
    """
    run = subprocess.run(
        [sys.executable, "-m", f"mlx_delta.{command}", "--help"],
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()
