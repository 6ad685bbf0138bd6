"""Reading the files of tasks that are at hand as files: WinoGrande, LAMBADA, and SQuAD 2.0's form.

A broken file is refused with the line or question that breaks it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Choice:
    """Two texts that share their end, and which of them is right.

    Attributes:
        beginnings: The texts up to where they agree.
        end: What follows.
        right: Index of the right one.
    """

    beginnings: tuple[str, str]
    end: str
    right: int


@dataclass(frozen=True)
class Completion:
    """A passage and the words that end it."""

    passage: str
    end: str


@dataclass(frozen=True)
class Question:
    """A question on a paragraph.

    Attributes:
        paragraph: Title and text, as every question on it begins.
        question: The question.
        answers: What is right; empty: the paragraph does not say.
    """

    paragraph: str
    question: str
    answers: tuple[str, ...]


def file_entry(file: Path) -> dict[str, str]:
    """What says in results which file it was."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return {"file": file.name, "file_hash": digest}


def read_winogrande(file: Path) -> list[Choice]:
    """WinoGrande's lines: ``sentence`` with a gap ``_``, ``option1``, ``option2``, ``answer``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this form; the message names the line.
    """
    return _read_lines(file, _choice, "sentence with one _, option1, option2, and answer 1 or 2")


def read_lambada(file: Path) -> list[Completion]:
    """LAMBADA's lines: ``context`` and ``continuation``, or ``text`` whose last word is asked.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this form; the message names the line.
    """
    return _read_lines(file, _completion, "context and continuation, or text")


def read_squad(file: Path) -> list[list[Question]]:
    """SQuAD 2.0's JSON: the questions of each paragraph.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this form; the message says what is missing.
    """
    try:
        articles = json.loads(_text(file))["data"]
        paragraphs = [
            [
                Question(
                    f"Title: {article['title']}\n\nBackground: {paragraph['context']}\n\n",
                    str(asked["question"]),
                    tuple(str(answer["text"]) for answer in asked["answers"]),
                )
                for asked in paragraph["qas"]
            ]
            for article in articles
            for paragraph in article["paragraphs"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"[evaluate] {file} is not in SQuAD 2.0's form: {what}.") from error
    paragraphs = [questions for questions in paragraphs if questions]
    if not paragraphs:
        raise ValueError(f"[evaluate] {file} has no questions.")
    return paragraphs


def _read_lines(file: Path, read: Callable[[Any], Any], form: str) -> list[Any]:
    items = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(read(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"[evaluate] {file}, line {number}: a line must be a JSON object with {form}."
            ) from error
    if not items:
        raise ValueError(f"[evaluate] {file} is empty.")
    return items


def _choice(row: Any) -> Choice:
    before, after = row["sentence"].split("_")
    options = (before + row["option1"], before + row["option2"])
    return Choice(options, f" {after.strip()}", ("1", "2").index(row["answer"]))


def _completion(row: Any) -> Completion:
    if "text" in row:
        passage, _, end = row["text"].strip().rpartition(" ")
    else:
        passage, end = row["context"].strip(), row["continuation"].strip()
    if not passage or not end:
        raise ValueError
    return Completion(passage, f" {end}")


def _text(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"[evaluate] there is no file {str(file)!r}.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[evaluate] {file} is not UTF-8 text.") from error
