"""The documentation says what is there: links, commands, and the errors that it explains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for link in (a or b for a, b in LINK.findall(text)):
        if not link.startswith(("http://", "https://")):
            # A built page lies one folder below its source: html there begins with ../.
            folders = [page.parent, page.parent / "page"]
            assert any((folder / link).resolve().exists() for folder in folders), link


def test_every_page_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in site


def test_the_readme_can_be_read_at_one_sitting():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1100


def errors() -> list[str]:
    """The parts of the FAQ's error messages between what varies."""
    headings = re.findall(r"^## error: (.+)$", (ROOT / "docs" / "faq.md").read_text("utf-8"), re.M)
    return [part.strip() for heading in headings for part in heading.split("…") if part.strip()]


@pytest.mark.parametrize("words", errors())
def test_an_error_that_is_explained_can_happen(words):
    folders = ("mlx_delta", "convert")
    sources = [p.read_text("utf-8") for folder in folders for p in (ROOT / folder).rglob("*.py")]
    # Messages are split over lines and filled in: compare words, without quotes and braces.
    plain = [re.sub(r'\{[^}]*\}|"\s*f?"|\s+', " ", source) for source in sources]
    wanted = re.sub(r"\[\w+\] ", "", words).split()
    assert any(re.search(r"\W+".join(map(re.escape, wanted)), source) for source in plain), words
