"""The one exception that reaches a user: a line that names the value and the remedy."""

from __future__ import annotations


class ConvertError(ValueError):
    """A conversion that can't be done, with a one-line reason."""

    def __init__(self, message: str):
        # One line whatever a file put into the message; long values are cut.
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= 600 else line[:597] + "...")
