"""Loading a model and its tokenizer, with checks that name what is wrong before anything runs."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.utils import _download, load_adapters, load_model, load_tokenizer

from .config import DeltaConfig
from .models import MODELS, get_model_classes
from .models.any import attend_with
from .models.common import read_delta
from .models.queries import query_sensitivities
from .sensitivities import Sensitivities
from .system.devices import has_gpu
from .ternary.model import loading_overrides

BUNDLED = Path(__file__).parent / "bundled"
DEMO = "demo"

# The delta argument's default: the setting that the model's config.json holds.
MODEL_SETTING: Literal["model"] = "model"


def load(
    path_or_hf_repo: str | Path = DEMO,
    delta: DeltaConfig | None | Literal["model"] = MODEL_SETTING,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, ...]:
    """Load a model that attends with the delta, and its tokenizer.

    Without a GPU the weights are converted to float32: other types have no fast product there.

    Args:
        path_or_hf_repo: A bundled model's name (``"demo"``), a directory, or a Hugging Face
            repository.
        delta: The setting; ``None`` for dense attention. When not given, the one in the model's
            config.json, or the default one if there is none.
        tokenizer_config: Passed to mlx-lm's ``load_tokenizer``.
        model_config: Entries that replace those of config.json; ``{"activation_bits": None}``
            leaves a BitNet's activations in floating point.
        adapter_path: LoRA adapters to apply.
        lazy: Leave the weights unread, and ternary ones unchecked, until they are needed.
        return_config: Return the model's configuration as well.
        revision: Revision of the repository.
        trust_remote_code: Let the tokenizer, and a dense model, run code of their own.

    Returns:
        The model and the tokenizer, and the configuration if asked for.

    Raises:
        FileNotFoundError: There is no such model, or a file of it is missing.
        ValueError: A file is broken, or the model is of a kind that can't hold keys.
        MemoryError: The weights are larger than this machine's memory.
    """
    path = find_model(path_or_hf_repo, revision)
    config = read_config(path)
    check_weights(path)
    check_memory(path)
    if delta == MODEL_SETTING:
        delta = read_setting(path, config)
    elif delta is not None:
        delta = with_sensitivities(path, delta)
    # Our classes stand in for a model_file, which would need trust_remote_code to run.
    overrides = {**(model_config or {}), "delta": delta, "model_file": None}
    overrides |= loading_overrides({**config, **overrides})
    options: dict[str, Any] = {"model_config": overrides, "get_model_classes": get_model_classes}
    if delta is None and config.get("model_type") not in MODELS:
        options = {"model_config": model_config, "trust_remote_code": trust_remote_code}
    try:
        model, config = load_model(path, lazy=True, **options)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        # mlx-lm builds the model from the configuration without checking it.
        raise ValueError(
            f"[load] {path / 'config.json'} does not describe a model that can be built: {error}."
        ) from error
    if delta is not None:
        config["delta"] = delta.to_dict()
        attend_with(model, delta)
    if not has_gpu():
        model.set_dtype(mx.float32)
    if not lazy and hasattr(model, "check_weights"):
        model.check_weights()
    if adapter_path is not None:
        model = load_adapters(model, adapter_path)
        model.eval()
    if not lazy:
        mx.eval(model.parameters())
    tokenizer_config = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    tokenizer = load_tokenizer(path, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    if delta is not None and delta.cuts_runs and delta.sensitivities is None and not lazy:
        model.args.delta = delta.changed(sensitivities=query_sensitivities(model, tokenizer, delta))
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def read_setting(path: Path, config: dict[str, Any]) -> DeltaConfig | None:
    """The setting of a model's directory: that of its config.json, or the default one.

    Args:
        path: The directory.
        config: What its config.json holds.

    Returns:
        ``None`` where the file asks for dense attention.

    Raises:
        FileNotFoundError: The file of its sensitivities is missing.
        ValueError: The setting is broken, or that file is.
    """
    delta = read_delta(config.get("delta", DeltaConfig()))
    return None if delta is None else with_sensitivities(path, delta)


def with_sensitivities(path: Path, delta: DeltaConfig) -> DeltaConfig:
    """The setting with its sensitivities read, where it only names their file."""
    name = delta.sensitivities
    if not isinstance(name, str):
        return delta
    return delta.changed(sensitivities=Sensitivities.find(path, name))


def find_model(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The directory of a bundled model, a local one, or one fetched from the hub.

    Raises:
        FileNotFoundError: It is none of these.
    """
    name = str(path_or_hf_repo)
    if not name.strip():
        raise FileNotFoundError("[load] the model's name is empty; give a path or a hub name.")
    if (BUNDLED / name / "config.json").is_file() and Path(name).name == name:
        return BUNDLED / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"[load] model {name!r} is a file; give the directory it is in.")
    bundled = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"[load] there is no model directory {name!r}; give an existing path, a hub name "
            f"(owner/name), or a bundled model ({bundled})."
        )
    try:
        return _download(name, revision=revision)
    except Exception as error:  # whatever the hub's client raises: they share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"[load] model {name!r} is neither a local directory nor could it be fetched from "
            f"the hub: {reason}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """A model directory's config.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"[load] {path} has no config.json: not a model directory.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"[load] {file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"[load] {file} must hold a JSON object but holds {type(config).__name__}."
        )
    return config


def check_weights(path: Path) -> None:
    """Check that a directory's weight files are all there and whole, without reading weights.

    Raises:
        FileNotFoundError: There are no weights, or a shard that the index names is missing.
        ValueError: A file is truncated or not safetensors.
    """
    files = sorted(path.glob("model*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"[load] {index} is not a valid index of weights: {error}.") from error
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"[load] {path} lacks {missing[0]} ({len(missing)} of {len(shards)} weight files "
                "missing); fetch the model again."
            )
    if not files:
        raise FileNotFoundError(f"[load] {path} has no weights (model*.safetensors).")
    for file in files:
        _check_safetensors(file)


def check_memory(path: Path) -> None:
    """Refuse weights that this machine can't hold: MLX would end the process without a word.

    Raises:
        MemoryError: They are larger than the memory, as float32 where there is no GPU.
    """
    bytes_of = (lambda file: file.stat().st_size) if has_gpu() else _float32_bytes
    size = sum(bytes_of(file) for file in path.glob("model*.safetensors"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise MemoryError(
            f"[load] the weights of {path} take {size / 1e9:.1f} GB but this machine has "
            f"{memory / 1e9:.1f} GB of memory; use a smaller or more strongly quantized model."
        )


def _float32_bytes(file: Path) -> int:
    """Bytes of a file's tensors once those of 16-bit floats are float32."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    size = 0
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            size += (end - start) * (2 if entry["dtype"] in ("F16", "BF16") else 1)
    return size


def _check_safetensors(file: Path) -> None:
    """Compare a safetensors file's size with what its header announces."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(f"[load] {file} is truncated or not a safetensors file.")
        try:
            header = json.loads(stream.read(length))
            ends = {
                name: 8 + length + entry["data_offsets"][1]
                for name, entry in header.items()
                if name != "__metadata__"
            }
            end = max(ends.values(), default=8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"[load] {file} has a broken safetensors header.") from error
    if end != size:
        cut = [name for name in ends if ends[name] > size]
        what = f" (tensor {min(cut, key=lambda name: ends[name])} is cut off)" if cut else ""
        raise ValueError(
            f"[load] {file} has {size} bytes but its header announces {end}{what}; fetch or "
            "convert it again."
        )
