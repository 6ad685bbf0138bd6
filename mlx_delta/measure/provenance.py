"""What a results file says of the model and the machine that were measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import mlx.core as mx

from mlx_delta.loading import find_model
from mlx_delta.system.devices import has_gpu

_SAMPLE = 1 << 16  # bytes read of a weight file at each of three places


def fingerprint(path: Path, adapter_path: Path | None = None) -> str:
    """A hash that tells models apart without reading all of their weights.

    Of config.json, and of each weight file its name, size, and bytes at its start, middle and end;
    the adapters' too. A calibration leaves the model what it was, and is not counted: a run of a
    setting says which sensitivities it had.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config.pop("delta", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    weights = sorted(path.glob("model*.safetensors"))  # sensitivities lie beside them
    adapters = [] if adapter_path is None else sorted(adapter_path.glob("*.safetensors"))
    for file in [*weights, *adapters]:
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                stream.seek(max(0, start))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def model_entry(name: str, adapter_path: str | None = None) -> dict[str, str]:
    """A results file's ``model``: the name as it was given, and the fingerprint."""
    adapters = None if adapter_path is None else Path(adapter_path)
    return {"name": name, "fingerprint": fingerprint(find_model(name), adapters)}


def machine_entry() -> dict[str, str]:
    """A results file's ``machine``."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(mx.device_info()["device_name"]) if has_gpu() else "CPU",
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
    }
