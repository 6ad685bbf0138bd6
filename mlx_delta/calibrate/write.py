"""Writing a setting into a model's config.json; its other entries stay, byte for byte."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mlx_delta.config import DeltaConfig
from mlx_delta.sensitivities import FILE_NAME, Sensitivities
from mlx_delta.system.files import written_aside

ENTRY = "delta"
_SPACE = re.compile(r"[ \t\r\n]*")


def check_target(name: str, path: Path, output: Path | None) -> None:
    """Refuse a place that can't or should not be written to, before any work is done.

    Args:
        name: Of the model, as it was given.
        path: Its directory.
        output: Where a copy is to be, or ``None``: the directory itself is to be changed.

    Raises:
        ValueError: The directory is not the user's own and was not named by its path.
        OSError: It can't be written, or there is something already.
    """
    if output is None:
        if path != Path(name).expanduser():
            raise ValueError(
                f"model {name!r} is kept in {path}, which is not changed unless it is named "
                "itself; pass --output DIR for a calibrated copy, --dry-run to only see the "
                f"thresholds, or --model {path}."
            )
        check_file(path / "config.json")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists already; give a new directory.")
    if path.resolve() in output.resolve().parents:
        raise ValueError(f"--output {output} lies inside the model's own directory {path}.")
    existing = next(parent for parent in output.resolve().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {output}: can't write in {existing}.")


def check_file(file: Path) -> None:
    """Refuse a file that can't be written, before any work is done.

    Raises:
        OSError: It is a directory, or its directory is missing or not writable.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a directory; give a file name.")
    parent = file.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"there is no directory {file.parent}.")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"can't write in {parent}.")


def write_setting(file: Path, config: DeltaConfig) -> None:
    """Put a setting into a config.json, and its sensitivities beside it: both whole, or neither.

    Raises:
        OSError: They can't be written; what was there is as it was.
    """
    sensitivities = config.sensitivities
    aside = file.resolve().with_name(f".{FILE_NAME}.tmp.safetensors")
    if isinstance(sensitivities, Sensitivities):
        config = config.changed(
            sensitivities=sensitivities.with_curve(sensitivities.curve, FILE_NAME)
        )
    with file.open(encoding="utf-8", newline="") as stream:  # line ends as they are
        text = stream.read()
    text = with_entry(text, ENTRY, merged(json.loads(text).get(ENTRY), config))
    try:
        if isinstance(sensitivities, Sensitivities):
            sensitivities.save(aside)
        with written_aside(file, text.encode()):
            # The last thing that takes room is done. First: until config.json names it, nothing
            # reads it.
            if isinstance(sensitivities, Sensitivities):
                os.replace(aside, file.resolve().with_name(FILE_NAME))
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def copy_model(source: Path, target: Path, config: DeltaConfig) -> None:
    """A copy of a model's directory with a setting of its own; there whole or not at all.

    Raises:
        OSError: It can't be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(".tmp", f".{target.name}.", target.parent.resolve()))
    try:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        write_setting(temporary / "config.json", config)
        if target.is_dir():
            target.rmdir()  # empty: checked before the work began
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def merged(old: Any, config: DeltaConfig) -> dict[str, Any]:
    """The ``delta`` entry: what it held before, and what of the new setting differs from that."""
    old = dict(old or {})
    before = DeltaConfig.from_dict(old).to_dict()
    new = config.to_dict()
    always = ("threshold", "level", "sensitivities")
    changed = {k: v for k, v in new.items() if k in (*always, *old) or v != before.get(k)}
    return {k: v for k, v in old.items() if k in new} | changed


def with_entry(text: str, key: str, value: dict[str, Any]) -> str:
    """The text of a JSON object with one entry replaced or added, and nothing else changed.

    Args:
        text: A JSON object.
        key: The entry's name.
        value: What it becomes.
    """
    entries, end = _entries(text)
    first = next(iter(entries.values()), None)
    line_end = "\r\n" if "\r\n" in text else "\n"
    # What stands between the brace and the first key: a line end and the indentation, or nothing.
    before = text[text.index("{") + 1 : first[0]] if first else ""
    if key in entries:
        _, start, stop = entries[key]
        return text[:start] + _dump(value, before, line_end) + text[stop:]
    added = f"{before}{json.dumps(key)}: {_dump(value, before, line_end)}"
    if not first:
        return text[: text.index("{") + 1] + added + text[end:]
    last = max(stop for _, _, stop in entries.values())
    separator = "," if "\n" in before else ", "
    return text[:last] + separator + added + text[last:]


def _dump(value: dict[str, Any], before: str, line_end: str) -> str:
    """JSON text of an entry; one line per setting where the object has one line per entry."""
    if "\n" not in before:
        return json.dumps(value)
    indent = before.rsplit("\n", 1)[1]
    lines = [f"{indent}{indent}{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
    return "{" + line_end + f",{line_end}".join(lines) + line_end + indent + "}"


def _entries(text: str) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Where the entries of a JSON object stand: begin of key, begin and end of value.

    Of entries with the same name the last one counts, as when the text is read. Also returns
    where the closing brace is.
    """

    def skip(i: int) -> int:
        match = _SPACE.match(text, i)
        assert match is not None
        return match.end()

    entries: dict[str, tuple[int, int, int]] = {}
    decoder = json.JSONDecoder()
    i = skip(skip(0) + 1)
    while text[i] != "}":
        key, colon = decoder.raw_decode(text, i)
        start = skip(skip(colon) + 1)
        _, stop = decoder.raw_decode(text, start)
        entries[key] = (i, start, stop)
        i = skip(stop)
        if text[i] == ",":
            i = skip(i + 1)
    return entries, i
