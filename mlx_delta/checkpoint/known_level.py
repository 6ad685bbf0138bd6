"""A catalogued model's sensitivities and level, put beside it and kept up to date.

They come with the library and change with it, while the model they lie beside stays as it was
made. What a user has put in their place stays too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_delta.config import DeltaConfig
from mlx_delta.sensitivities import BUNDLED, Sensitivities
from mlx_delta.system.files import write_whole

from .catalogue import Entry
from .json_file import check_regular, read_json

CONFIG = "config.json"


def put_level(entry: Entry, folder: Path) -> None:
    """Put an entry's sensitivities beside its model, and name them in its config.json.

    Raises:
        OSError: A file can't be written; config.json is as it was then.
    """
    if entry.sensitivities is None:
        return
    file = BUNDLED / entry.sensitivities
    data = file.read_bytes()
    others = {"level": float(f"{Sensitivities.read(file).level_for(entry.zeros):.4g}")}
    if entry.window != DeltaConfig.window:
        others["window"] = entry.window
    name = _name(data, others)
    delta = {**others, "sensitivities": name}
    config = read_json(folder / CONFIG)
    if config.get("delta") == delta:
        return
    # First: whoever reads the old config.json finds what it names, whoever the new one, too.
    text = json.dumps({**config, "delta": delta}, indent=2) + "\n"
    write_whole(folder / name, data)
    write_whole(folder / CONFIG, text.encode())


def update_level(entry: Entry, folder: Path) -> None:
    """Put newer ones in the place of older ones, if these are ours and can be replaced."""
    # A cache that is only read serves with what it has; of a broken file loading says more.
    with suppress(OSError, ValueError):
        if _is_ours(read_json(folder / CONFIG).get("delta"), folder):
            put_level(entry, folder)


def _is_ours(delta: Any, folder: Path) -> bool:
    """Whether a setting is as :func:`put_level` left it."""
    if not isinstance(delta, dict) or not {"level", "sensitivities"} <= delta.keys():
        return False
    others = dict(delta)
    name = others.pop("sensitivities")
    if name != Path(str(name)).name:
        return False
    check_regular(folder / name)
    return bool(name == _name((folder / name).read_bytes(), others))


def _name(data: bytes, others: Mapping[str, Any]) -> str:
    """The file of these sensitivities, in a setting with these other values."""
    more = {name: value for name, value in others.items() if name != "level"}
    said = ",".join([repr(others["level"]), *(f"{name}={more[name]!r}" for name in sorted(more))])
    own = hashlib.sha256(data + said.encode()).hexdigest()[:8]
    return f"delta_sensitivities-{own}.safetensors"
