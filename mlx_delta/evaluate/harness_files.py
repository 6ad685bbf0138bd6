"""Local data for the harness's tasks: finding them, and reading them as a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

FORMATS = (".jsonl", ".json", ".parquet")


def find_files(task: str, data_dir: Path | None) -> dict[str, list[Path]]:
    """A task's local data files by split; ``""`` for one file that stands for the whole task.

    ``DIR/winogrande/validation.jsonl``, ``DIR/winogrande/train-00000-of-00002.parquet`` (as the hub
    names them) or ``DIR/winogrande.jsonl``; of several formats the first counts.
    """
    files: dict[str, list[Path]] = {}
    if data_dir is None:
        return files
    for suffix in FORMATS:
        if (file := data_dir / f"{task}{suffix}").is_file():
            return {"": [file]}
    for suffix in FORMATS:
        found: dict[str, list[Path]] = {}
        for file in sorted((data_dir / task).glob(f"*{suffix}")):
            found.setdefault(file.stem.split("-")[0], []).append(file)
        files = {**found, **files}
    return files


class Splits(dict[str, Any]):
    """A task's local data as the harness takes a dataset: splits by their names.

    Every task looks at its training split, even if it shows no worked examples. Where there is no
    such file the evaluated split stands in for it, and ``borrowed`` says so.

    Args:
        task: The task.
        data_dir: Where its data are.
        files: From :func:`find_files`.
        config: The task's.

    Raises:
        FileNotFoundError: The split that is evaluated is not there.
        ValueError: A file is broken.
    """

    def __init__(
        self, task: str, data_dir: Path, files: dict[str, list[Path]], config: dict[str, Any]
    ):
        self.borrowed: str | None = None
        names = [config.get(key) for key in ("test_split", "validation_split")]
        # Tasks that are Python classes don't say; by custom they have one of these.
        evaluated = [name for name in names if name][:1] or ["validation", "test"]
        for split, paths in files.items():
            rows = [row for path in paths for row in read_rows(path)]
            data = datasets.Dataset.from_list(rows)
            self.update(dict.fromkeys([split] if split else evaluated, data))
        present = [name for name in evaluated if name in self]
        if not present:
            raise FileNotFoundError(
                f"[evaluate] {task!r} is evaluated on its split {evaluated[0]!r}, but "
                f"{data_dir / task} has {', '.join(sorted(files))} only; put {evaluated[0]}.jsonl "
                "there."
            )
        self._evaluated = present[0]
        self._required = evaluated

    def __missing__(self, split: str) -> Any:
        if split in self._required:
            raise FileNotFoundError(
                f"[evaluate] the task reads its split {split!r}, of which there is no file."
            )
        self.borrowed = split
        return self[self._evaluated]

    @property
    def columns(self) -> list[str]:
        """The columns of the evaluated split."""
        return list(self[self._evaluated].column_names)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The examples in a data file.

    Raises:
        ValueError: It is not what its name says; the message names the line.
    """
    if file.suffix == ".parquet":
        try:
            return list(pyarrow.parquet.read_table(file).to_pylist())
        except pyarrow.ArrowException as error:
            raise ValueError(f"[evaluate] {file} is not a parquet file: {error}.") from error
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[evaluate] {file} is not UTF-8 text.") from error
    if file.suffix == ".json":
        rows = _parse(text, str(file))
    else:
        # Not splitlines: JSON strings may hold U+2028 as it is.
        lines = enumerate(text.split("\n"), 1)
        rows = [_parse(line, f"{file}, line {n},") for n, line in lines if line.strip()]
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"[evaluate] {file} must hold JSON objects, one for each example.")
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"[evaluate] {where} is not valid JSON: {error}.") from error
