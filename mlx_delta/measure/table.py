"""Tables of strings, as aligned text or Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of strings, and the line above it."""

    caption: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """Aligned columns."""
        widths = [max(len(row[i]) for row in [self.header, *self.rows]) for i in self._columns]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [self.header, *self.rows]
        ]
        return "\n".join([self.caption, *lines])

    def markdown(self) -> str:
        """A Markdown table."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [[f"`{row[0]}`", *row[1:]] for row in self.rows]
        lines = [f"| {' | '.join(row)} |" for row in [self.header, rule, *rows]]
        return "\n".join([self.caption, "", *lines])

    @property
    def _columns(self) -> range:
        return range(len(self.header))


def format_bytes(size: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
