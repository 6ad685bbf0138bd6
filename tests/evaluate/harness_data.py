"""Small local data for the harness's tasks, in the columns of the datasets themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Greta", "Henry")
PLACES = ("river", "market", "garden", "station", "library", "harbour", "school", "forest")
PAIRS = tuple(zip(NAMES, PLACES, strict=True))


def winogrande() -> list[dict[str, Any]]:
    """Sentences with a gap and two ways to fill it, some of one token and some of several."""
    rows = []
    for i, (name, place) in enumerate(PAIRS):
        other = NAMES[(i + 3) % len(NAMES)]
        walk = "and walked on, and on, " * (i % 4)
        rows.append(
            {
                "sentence": f"{name} met {other} near the old {place} in the evening {walk}"
                f"because _ wanted to see the {place} again.",
                "option1": name,
                "option2": other,
                "answer": str(1 + i % 2),
            }
        )
    return rows


def squad() -> list[dict[str, Any]]:
    """Questions about short texts; every third has no answer."""
    rows = []
    for i, (name, place) in enumerate(PAIRS[:6]):
        text = f"{name} lived near the {place} for years. " * (2 + i % 3) + "Nobody knew why."
        answerable = i % 3 != 2
        answers = {"text": [f"near the {place}", place], "answer_start": [0, 0]}
        rows.append(
            {
                "id": f"q{i}",
                "title": name,
                "context": text,
                "question": f"Where did {name} live?" if answerable else "Who was the king?",
                "answers": answers if answerable else {"text": [], "answer_start": []},
            }
        )
    return rows


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def write_tasks(folder: Path) -> Path:
    """WinoGrande and SQuAD v2, and two tasks with YAML files of their own."""
    write_jsonl(folder / "winogrande" / "validation.jsonl", winogrande())
    write_jsonl(folder / "squadv2" / "validation.jsonl", squad())
    texts = [{"text": f"{name} went to the {place}."} for name, place in PAIRS]
    write_jsonl(folder / "small_texts.jsonl", texts)
    (folder / "small_texts.yaml").write_text(
        "task: small_texts\n"
        "dataset_path: nobody/nothing\n"
        "output_type: loglikelihood_rolling\n"
        "test_split: test\n"
        "doc_to_text: ''\n"
        "doc_to_target: '{{text}}'\n"
        "metric_list:\n"
        "  - metric: bits_per_byte\n"
    )
    (folder / "elsewhere.yaml").write_text(
        "task: elsewhere\n"
        "dataset_path: nobody/nothing-of-this-name\n"
        "output_type: generate_until\n"
        "training_split: train\n"
        "validation_split: validation\n"
        "doc_to_text: '{{passage}} {{question}}'\n"
        "doc_to_target: answer\n"
        "generation_kwargs:\n"
        "  until: ['.']\n"
    )
    return folder
