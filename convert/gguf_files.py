"""What to do about GGUF files that stand where a model directory is expected.

The standard library only, so that whoever loads models can say it, too.
"""

from __future__ import annotations

import re
from pathlib import Path

# As llama-gguf-split names them.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def split_advice(files: list[Path]) -> str | None:
    """What to do about the parts of one split model, if that is what the files are.

    Args:
        files: GGUF files of a directory, or a single one.
    """
    matches = [PART.fullmatch(file.name) for file in files]
    found = [match for match in matches if match]
    if not found or len(found) < len(files) or len({m[1] + m[3] for m in found}) > 1:
        return None
    name, count = found[0][1], int(found[0][3])
    have = {int(match[2]) for match in found}
    missing = [i for i in range(1, min(count, 100_000) + 1) if i not in have]
    merge = (
        f"merge them (llama-gguf-split --merge {name}-00001-of-{count:05d}.gguf {name}.gguf) and "
        f"convert {name}.gguf"
    )
    if len(files) > 1 and missing:
        return (
            f"{len(have)} of the {count} parts of one model, without part {missing[0]}; fetch all "
            f"parts, then {merge}"
        )
    what = f"the {count} parts of one model" if len(files) > 1 else f"one of {count} parts"
    return f"{what}; {merge}"


def gguf_advice(path: Path) -> str | None:
    """What to do about a path that is a GGUF file, or a directory of them without config.json.

    Returns:
        The rest of a sentence that begins with the path, such as ``is a GGUF file; ...``;
        ``None`` if it is something else.
    """
    if path.is_file() and path.suffix == ".gguf":
        parts = split_advice([path])
        if parts:
            return f"is {parts}."
        return (
            "is a GGUF file; make a model directory of it with "
            f"python -m mlx_delta.convert {path} -o DIRECTORY."
        )
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if not files:
        return None
    parts = split_advice(files)
    if parts:
        return f"holds {parts}."
    if len(files) > 1:
        return (
            f"holds {len(files)} GGUF files; make a model directory of one with "
            f"python -m mlx_delta.convert {path} --gguf-file {files[0].name} -o DIRECTORY."
        )
    return (
        "holds a GGUF file; make a model directory of it with "
        f"python -m mlx_delta.convert {path} -o DIRECTORY."
    )
