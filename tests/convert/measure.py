"""Peak memory and time of a conversion, beside mlx_lm.convert on the same checkpoint.

    python -m tests.convert.measure [GIGABYTES] [FOLDER]

makes a random Llama of about that size (2 unless told), of Llama 3.2's proportions: a quarter of
it is the embedding. Both write 4-bit weights with groups of 64; neither compares the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mlx_delta.convert.safetensors_io import Spec, Writer

from . import checkpoints as made

ROWS = 4096


def make(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint, some rows at a time; its size."""
    config = made.LLAMA | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": max(1, round((gigabytes - 0.53) / 0.122)),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    made.write_tokenizer(folder, 384)
    shapes = made.shapes(config)
    specs = [Spec(name, "BF16", shape) for name, shape in shapes.items()]
    writer = Writer(folder / "model.safetensors", specs)
    state = np.random.default_rng(0)
    for name, shape in shapes.items():
        for start in range(0, shape[0], ROWS):
            rows = (min(shape[0], start + ROWS) - start, *shape[1:])
            values = state.standard_normal(rows, dtype=np.float32) * 0.02
            writer.write(name, start, (values.view(np.uint32) >> 16).astype(np.uint16))
    writer.close()
    return sum(spec.nbytes for spec in specs)


def measure(name: str, *command: object) -> tuple[float, float]:
    """Run a command: seconds, and the peak of the memory of it or of a process that it started."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    cpu = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{name}: {seconds:.1f} s ({cpu:.1f} s of processor time), peak {peak / 1e6:.0f} MB"
        + (f", exit status {status}" if status else ""),
        flush=True,
    )
    return seconds, peak


def main() -> None:
    """Measure."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        size = make(folder / "source", gigabytes)
        print(f"checkpoint: {size / 1e9:.2f} GB", flush=True)
        source = folder / "source"
        same = ["--q-bits", 4, "--q-group-size", 64]
        ours = ["mlx_delta.convert", source, "--quiet", *same, "--embed-bits", 4]
        stock = ["mlx_lm", "convert", "--hf-path", source, "-q", *same, "--mlx-path"]
        # In turns: the first run of either reads the checkpoint into the disk cache.
        for i in range(2):
            old, _ = measure("mlx_lm.convert -q", *stock, folder / f"stock{i}")
            new, _ = measure("mlx_delta.convert --no-verify", *ours, "--no-verify", "-o",
                             folder / f"ours{i}")  # fmt: skip
            print(f"ratio {new / old:.2f}", flush=True)
        measure("mlx_delta.convert with its comparison", *ours, "-o", folder / "verified")


if __name__ == "__main__":
    main()
