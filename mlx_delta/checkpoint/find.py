"""From a model's name to its directory."""

from __future__ import annotations

from pathlib import Path

from mlx_lm.utils import _download

from .catalogue import CATALOGUE
from .json_file import one_line
from .obtain import obtain
from .weights import gguf_advice

BUNDLED = Path(__file__).parents[1] / "bundled"


def find_model(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The directory of a bundled model, a local one, a catalogued one, or one of the hub.

    A catalogued one is fetched and converted when it is first asked for.

    Raises:
        FileNotFoundError: It is none of these, or a directory of something else.
        ValueError: The name is not a name.
    """
    if not isinstance(path_or_hf_repo, (str, Path)):
        raise ValueError(
            f"[load] path_or_hf_repo must be a name or a path but got {path_or_hf_repo!r}."
        )
    name = str(path_or_hf_repo)
    if not name.strip():
        raise FileNotFoundError("[load] the model's name is empty; give a path or a hub name.")
    if "\0" in name:
        raise FileNotFoundError(f"[load] the model's name {name!r} is not a name.")
    if (BUNDLED / name / "config.json").is_file() and Path(name).name == name:
        return BUNDLED / name
    path = Path(name).expanduser()
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name too long
        raise FileNotFoundError(f"[load] model {name[:80]!r}: {one_line(error)}.") from error
    if is_directory:
        _check_kind(path)
        return path
    if exists and path.suffix == ".gguf":
        raise FileNotFoundError(f"[load] {gguf_advice(path)}")
    if exists:
        raise FileNotFoundError(f"[load] model {name!r} is a file; give the directory it is in.")
    if name in CATALOGUE:
        return obtain(name)
    bundled = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"[load] there is no model directory {name!r}; give an existing path, a hub name "
            f"(owner/name), a bundled model ({bundled}), or one that is fetched by its name "
            f"({', '.join(sorted(CATALOGUE))})."
        )
    try:
        return _download(name, revision=revision)
    except Exception as error:  # whatever the hub's client raises: they share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"[load] model {name!r} is neither a local directory nor could it be fetched from "
            f"the hub: {reason}"
        ) from error


def _check_kind(path: Path) -> None:
    """Say what to do with directories that are often taken for models."""
    if (path / "config.json").is_file():
        return
    if any(path.glob("*.gguf")):
        raise FileNotFoundError(f"[load] {gguf_advice(path)}")
    if (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"[load] {path} is an adapter; load its base model, with adapter_path={str(path)!r} "
            "(--adapter-path)."
        )
