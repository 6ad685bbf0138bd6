"""Damaged and hostile checkpoints, thousands of them: an error in one line, or a correct result.

    python -m tests.convert.fuzz FORMAT COUNT SEED

converts COUNT mutations of one small checkpoint in this process and prints what happened as
JSON. A crash, a hang, a leap in memory, an exception that is no ConvertError, a file outside
the target or a change to the source is a failure; each is named by its number, and
``--only NUMBER`` runs that one again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_delta  # noqa: F401  (before MLX)
from mlx_delta.convert.check import check_directory
from mlx_delta.convert.converting import Job, convert
from mlx_delta.convert.errors import ConvertError
from mlx_delta.loading import load_model
from mlx_delta.models import get_model_classes

from . import checkpoints as made
from .memory import peak_bytes
from .mutations import (
    TINY_WIDE,
    file_level,
    gguf_level,
    index_level,
    json_level,
    safetensors_level,
    spm_level,
)

SECONDS = 60  # a busy machine may stop a process for many
LEAP = 120_000_000  # bytes that one case may add to the peak
TINY = made.LLAMA | {"num_hidden_layers": 1}
TINY_BITNET = made.BITNET | {"num_hidden_layers": 1}
TINY_GEMMA = made.GEMMA | {"num_hidden_layers": 2}


def make_mlx(folder: Path) -> None:
    """A quantized mlx-lm directory."""
    made.write_llama(folder / "float", TINY)
    convert(Job(str(folder / "float"), folder / "mlx", verify=False, quiet=True), say=str)
    for file in (folder / "mlx").iterdir():
        shutil.move(file, folder / file.name)
    shutil.rmtree(folder / "float")
    shutil.rmtree(folder / "mlx")


def make_sentencepiece(folder: Path) -> None:
    """A directory with only a tokenizer.model."""
    from .test_tokenizers import train

    made.write_llama(folder, TINY, tokenizer=False)
    (folder / "tokenizer.model").write_bytes(train(folder))


def make_beside(folder: Path) -> None:
    """A directory with every file that may stand beside the weights."""
    made.write_llama(folder, TINY)
    for name, values in {
        "generation_config": {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.7},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        "added_tokens": {"<s>": 1, "</s>": 2},
        "chat_template": {"chat_template": [{"name": "default", "template": "x"}]},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


Mutation = Callable[[random.Random, Path], str]
# How to make the checkpoint; what to mutate, by file name.
FORMATS: dict[str, tuple[Callable[[Path], Any], dict[str, list[Mutation]]]] = {
    "safetensors": (
        lambda folder: made.write_llama(folder, TINY, shards=2),
        {
            "model-00001-of-00002.safetensors": [safetensors_level, safetensors_level, file_level],
            "model-00002-of-00002.safetensors": [safetensors_level, file_level],
            "model.safetensors.index.json": [index_level, json_level, file_level],
            "config.json": [json_level, json_level, json_level, file_level],
            "tokenizer.json": [json_level, file_level],
            "tokenizer_config.json": [json_level, file_level],
        },
    ),
    "bitnet": (
        lambda folder: made.write_packed(folder, TINY_BITNET),
        {
            "model.safetensors": [safetensors_level, safetensors_level, file_level, file_level],
            "config.json": [json_level, json_level, file_level],
        },
    ),
    "gguf": (
        lambda folder: made.write_gguf(folder / "m.gguf", TINY_WIDE, "Q4_0"),
        {"m.gguf": [gguf_level, gguf_level, gguf_level, file_level, file_level]},
    ),
    "mlx": (
        make_mlx,
        {
            "model.safetensors": [safetensors_level, safetensors_level, file_level],
            "config.json": [json_level, json_level, json_level, file_level],
            "model.safetensors.index.json": [index_level, json_level],
        },
    ),
    "gemma": (
        lambda folder: made.write_llama(folder, TINY_GEMMA),
        {
            "model.safetensors": [safetensors_level, file_level],
            "config.json": [json_level, json_level, json_level, file_level],
        },
    ),
    "beside": (
        make_beside,
        {
            "tokenizer.json": [json_level, json_level, file_level],
            "tokenizer_config.json": [json_level, json_level, file_level],
            "generation_config.json": [json_level, json_level, file_level],
            "special_tokens_map.json": [json_level, file_level],
            "added_tokens.json": [json_level, json_level, file_level],
            "chat_template.json": [json_level, json_level, file_level],
            "chat_template.jinja": [file_level],
        },
    ),
    "sentencepiece": (make_sentencepiece, {"tokenizer.model": [spm_level, spm_level, file_level]}),
}


def snapshot(folder: Path) -> dict[str, str]:
    """Everything in a directory: regular files by their contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "other"
    return found


def one(root: Path, format_: str, seed: int, number: int) -> tuple[str, str]:
    """One case: what was done, and ``error``, ``result`` or the failure."""
    rng = random.Random(f"{format_} {seed} {number}")
    case = root / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(root / "good", case / "source")
    names = FORMATS[format_][1]
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(list(names))
        file = case / "source" / name
        if file.is_file() and not file.is_symlink():
            try:
                done.append(rng.choice(names[name])(rng, file))
            except (
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RecursionError,
                struct.error,
            ):
                done.append(file_level(rng, file))  # what an earlier mutation left is no JSON
    what = "; ".join(done)
    before = snapshot(case), sorted(os.listdir(root))
    peak = peak_bytes()
    given = case / "source" / "m.gguf" if format_ == "gguf" else case / "source"
    signal.alarm(SECONDS)
    try:
        job = Job(str(given), case / "out", verify=False, quiet=True)
        convert(job, say=str)
        outcome = "result"
        classes = {} if format_ == "gemma" else {"get_model_classes": get_model_classes}
        model, _ = load_model(case / "out", lazy=True, **classes)
        check_directory(case / "out")
        del model
    except ConvertError as error:
        outcome = "error"
        if not str(error) or "\n" in str(error) or len(str(error)) > 600:
            return what, f"no clear error: {error!r}"
    except BaseException:
        return what, traceback.format_exc()
    finally:
        signal.alarm(0)
    grown = peak_bytes() - peak
    if grown > LEAP:
        return what, f"memory: {grown} bytes more"
    after = {
        name: value
        for name, value in snapshot(case).items()
        if name.split("/")[0] not in ("out", "out.partial")
    }
    if after != before[0] or sorted(os.listdir(root)) != before[1]:
        return what, "the source or its surroundings changed"
    if outcome == "error" and (case / "out").exists():
        return what, "an error, yet an output"
    return what, outcome


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=list(FORMATS))
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()

    def hang(number: int, frame: Any) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    counts = {"error": 0, "result": 0}
    failures = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "good").mkdir()
        FORMATS[args.format][0](root / "good")
        numbers = range(args.count) if args.only is None else [args.only]
        for number in numbers:
            print(number, end="\r", file=sys.stderr, flush=True)  # the last one, after a crash
            what, outcome = one(root, args.format, args.seed, number)
            if outcome in counts:
                counts[outcome] += 1
            else:
                failures.append({"number": number, "mutation": what, "failure": outcome})
    print(json.dumps({"format": args.format, **counts, "peak": peak_bytes(), "failures": failures}))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
