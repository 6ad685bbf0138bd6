"""Stop words, looked for in the text and not in the tokens.

A word has many spellings in tokens: mlx-lm looks for one of them, and generates on past the others.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Looks for the first of some words in a text that comes in pieces.

    Args:
        words: None of them empty.
    """

    def __init__(self, words: Sequence[str] = ()):
        self._words = tuple(words)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take a piece; returns what can be shown, and whether the text ends here.

        What may be the begin of a word is held back until it is clear.
        """
        if not self._words:
            return text, False
        text = self._held + text
        ends = [(at + len(word), at) for word in self._words if (at := text.find(word)) >= 0]
        if ends:  # the one that is whole first, however the text is cut
            self._held = ""
            return text[: min(ends)[1]], True
        keep = max(map(self._begun, [text] * len(self._words), self._words))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What is held back still, at the end of the text."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _begun(text: str, word: str) -> int:
        """How many of the word's first characters the text ends with."""
        lengths = range(min(len(word) - 1, len(text)), 0, -1)
        return next((n for n in lengths if text.endswith(word[:n])), 0)
