"""How pictures show settings: a few characters, and a colour and marker for each family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_delta.measure.baselines import BASELINES
from mlx_delta.measure.settings import QUANTIZED

from .theme import Theme

# Family: marker, index of its colour in Theme.accents (None: ink), and what it is.
FAMILIES: dict[str, tuple[str, int | None, str]] = {
    "dense": ("s", None, "dense"),
    "delta": ("o", 0, "delta"),
    "codes": ("D", 1, "codes"),
    "deltas": ("d", 7, "delta, codes"),
    "paper": ("^", 2, "paper's setting"),
    "quantized": ("v", 3, "mlx-lm quantized"),
    "others": ("<", 6, "others' quantized"),
    "rotating": ("P", 4, "mlx-lm rotating"),
    "window-only": ("X", 5, "window only"),
}
KEY = "θ: threshold up to which a key's change is held.  K4, V4: keys, values in codes of 4 bits."

Delta = Mapping[str, Any]  # a setting of the delta, as in a config.json; empty without one


def written_options(setting: str) -> dict[str, str]:
    """The options in a setting's name."""
    parts = (part.partition("=") for part in setting.partition(":")[2].split(","))
    return {key: value for key, equals, value in parts if equals}


def option(setting: str, delta: Delta, name: str) -> Any:
    """An option of a setting, from its name or else from the delta it stands for."""
    return written_options(setting).get(name, delta.get(name))


def family(setting: str, delta: Delta) -> str:
    """One of ``FAMILIES``."""
    kind = setting.partition(":")[0]
    if kind in ("delta", "paper") and option(setting, delta, "key_bits"):
        return option(setting, delta, "key_format") or "deltas"
    if kind in BASELINES:
        return "others"
    return "quantized" if kind in QUANTIZED else kind


def label(setting: str, delta: Delta) -> str:
    """A setting in a few characters; ``KEY`` explains them."""
    kind = setting.partition(":")[0]
    if kind == "rotating":
        return f"rotating {setting.partition(':')[2]}"
    if kind not in ("delta", "paper"):
        return setting
    written = written_options(setting)
    threshold = option(setting, delta, "threshold")
    if isinstance(threshold, (list, tuple)) or "/" in str(threshold):
        threshold = "per layer"
    parts = ["paper"] if kind == "paper" else []
    parts += ["codes"] if option(setting, delta, "key_format") == "codes" else []
    parts += [f"θ {threshold}"] if threshold is not None else []
    for name, letter in (("key_bits", "K"), ("value_bits", "V")):
        bits = option(setting, delta, name)
        parts += [f"{letter}{bits}"] if bits else []
    shown = ("threshold", "key_bits", "value_bits", "key_format", "value_format", "kv")
    parts += [f"{key}={value}" for key, value in written.items() if key not in shown]
    return " ".join(parts) or setting


def marker(family: str) -> str:
    """A family's marker; that of one unknown here, a star."""
    return FAMILIES.get(family, ("*", 5, ""))[0]


def color(theme: Theme, family: str) -> str:
    """A family's colour."""
    index = FAMILIES.get(family, ("*", 5, ""))[1]
    return theme.ink if index is None else theme.accents[index]
