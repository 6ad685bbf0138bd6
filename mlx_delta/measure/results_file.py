"""Reading the results files that ``python -m mlx_delta.evaluate`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSION = 1


def read_results(file: str | Path) -> dict[str, Any]:
    """A results file's contents.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a results file, or of a later version.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"[evaluate] there is no results file {str(file)!r}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if not (isinstance(data["runs"], list) and isinstance(data["model"]["fingerprint"], str)):
            raise TypeError("runs or model are not as expected")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"[evaluate] {file} is not a results file: {error}.") from error
    if version != VERSION:
        raise ValueError(
            f"[evaluate] {file} has version {version} of the results format but this release reads "
            f"{VERSION}; use another --output."
        )
    return dict(data)
