"""States of caches with a part that is not what it was."""

from __future__ import annotations

import json
from typing import Any


def header(state: list[Any], **changes: Any) -> list[Any]:
    """With other values in the header."""
    return [json.dumps({**json.loads(state[0]), **changes}), *state[1:]]


def setting(state: list[Any], **changes: Any) -> list[Any]:
    """With another setting."""
    return header(state, config={**json.loads(state[0])["config"], **changes})


def replaced(state: list[Any], index: int, value: Any) -> list[Any]:
    """With something else in one place."""
    return [*state[:index], value, *state[index + 1 :]]
