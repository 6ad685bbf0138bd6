"""Text as it comes from a model, cut where a terminal can show it: after whole characters.

What a reader sees as one character may be several of Unicode's, and come in several tokens: a
family is people joined together, a flag two letters. mlx-lm's detokenizers wait for the bytes of
one of Unicode's characters; here the rest is waited for.
"""

from __future__ import annotations

import re

_JOINER = "\u200d"
_PICTURE = (
    "\U0001f000-\U0001f1e5\U0001f200-\U0001f3fa\U0001f400-\U0001faff\u2190-\u2bff\u3030\u303d"
)
_SKIN = "\U0001f3fb-\U0001f3ff"
_AFTER = f"{_SKIN}\ufe0f\u20e3\U000e0020-\U000e007f"  # skin, picture form, key cap, tags
_LETTER_OF_FLAG = "\U0001f1e6-\U0001f1ff"
# One picture at the end, which what follows may still change.
_UNFINISHED = re.compile(
    f"(?:[{_PICTURE}][{_AFTER}]*(?:{_JOINER}[{_PICTURE}][{_AFTER}]*)*{_JOINER}?"
    f"|[0-9#*]\ufe0f|(?<![{_LETTER_OF_FLAG}])(?:[{_LETTER_OF_FLAG}]{{2}})*[{_LETTER_OF_FLAG}])$"
)
_LONGEST = 64  # characters that are waited for

REPLACEMENT = "\ufffd"  # what bytes that are no character are decoded to

# Control characters are shown, not obeyed: a document's text must not move the cursor or retitle
# the window. A line feed and a tab are text.
_SHOWN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_SHOWN |= {127: "\u2421", **{code: f"\\x{code:02x}" for code in range(128, 160)}}


class WholeText:
    """Takes pieces of a text and gives back those that end in a whole character."""

    def __init__(self) -> None:
        self._waiting = ""

    def add(self, piece: str) -> str:
        """What can be shown once ``piece`` has come."""
        text = self._waiting + piece
        unfinished = _UNFINISHED.search(text, max(0, len(text) - _LONGEST))
        end = len(text) if unfinished is None else unfinished.start()
        self._waiting = text[end:]
        return text[:end]

    def end(self, cut: bool = False) -> str:
        """What is left when no more comes.

        Args:
            cut: Whether the text was cut off, perhaps within a character, whose beginning is then
                dropped.
        """
        text, self._waiting = self._waiting, ""
        return text.rstrip(REPLACEMENT + _JOINER) if cut else text


def harmless(text: str) -> str:
    """The text with its control characters made visible."""
    return text.replace("\r\n", "\n").translate(_SHOWN)
