"""Fixtures of the converter's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_delta.convert.converting import Job, convert
from mlx_delta.convert.plan import Options
from mlx_delta.convert.sources import SourceOptions

FLOAT = Options(bits=None, embed_bits=None, dtype="F32")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Converts in this process, without the comparison: the output and the report."""

    def run_(
        source: Path | str, options: Options | None = None, name: str = "out", **job: Any
    ) -> tuple[Path, dict[str, Any]]:
        reading = SourceOptions(**job.pop("reading", {}))
        values = {"verify": False, "quiet": True, **job}
        output = tmp_path / name
        report = convert(
            Job(str(source), output, options=options or Options(), reading=reading, **values),
            say=lambda text: None,
        )
        return output, report

    return run_


def load_weights(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a directory."""
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found


def dequantized(folder: Path, name: str, config: dict[str, Any]) -> mx.array:
    """A layer's weights in float32, by MLX's own function and what config.json says."""
    arrays = load_weights(folder)
    path = name.rpartition(".")[0]
    if path + ".scales" not in arrays:
        return arrays[name].astype(mx.float32)
    entry = config["quantization"].get(path, config["quantization"])
    scales, biases = (arrays[f"{path}.{p}"].astype(mx.float32) for p in ("scales", "biases"))
    return mx.dequantize(arrays[name], scales, biases, entry["group_size"], entry["bits"])
