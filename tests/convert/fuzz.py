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

SECONDS = 60  # a busy machine may stop a process for many
LEAP = 120_000_000  # bytes that one case may add to the peak
TINY = made.LLAMA | {"num_hidden_layers": 1}
TINY_BITNET = made.BITNET | {"num_hidden_layers": 1}
TINY_WIDE = TINY | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}

NUMBERS: list[Any] = [None, -1, 0, 1, 2, 3, 63, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64]
VALUES: list[Any] = [
    *NUMBERS, True, False, 1.5, -0.0, 1e308, "", "x", "..", "../../evil", "/etc/passwd", "\0",
    "x" * 100_000, [], {}, [[]], {"a": {}}, [None], ["x"], [1, 2, 3], {"rope_type": "llama3"},
    "float16", "bitnet", "affine", "4",
]  # fmt: skip
RAW = ["NaN", "Infinity", "-1e999", "1" * 5000, "[" * 100_000, '{"a":' * 5000, "'", '"\\ud800"', ""]
NAMES = ["", "..", "../x", "/abs", "a/b", "x" * 5000, "model.embed_tokens.weight", "\0", "🙂", "."]


def flip(rng: random.Random, data: bytes) -> bytes:
    """Change some bytes, mostly near the start, where the structure is."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        end = len(changed) if rng.random() < 0.4 else min(len(changed), 4096)
        at = rng.randrange(end)
        what = rng.random()
        if what < 0.5:
            changed[at] ^= 1 << rng.randrange(8)
        elif what < 0.7:
            changed[at] = rng.randrange(256)
        elif what < 0.85:
            size = rng.choice((4, 8))
            number = rng.choice((0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1))
            changed[at : at + size] = struct.pack("<Q", number & ((1 << 64) - 1))[:size]
        elif what < 0.93:
            del changed[at : at + rng.choice((1, 8, 100))]
        else:
            changed[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
    return bytes(changed)


def file_level(rng: random.Random, file: Path) -> str:
    """Damage a file, or put something else in its place."""
    data = file.read_bytes()
    what = rng.choice(
        ("flip", "flip", "flip", "flip", "truncate", "truncate", "grow", "empty", "zero", "remove",
         "folder", "cycle", "absolute", "dangling", "device", "pipe")
    )  # fmt: skip
    if what in ("flip", "truncate", "grow", "empty", "zero"):
        at = rng.randrange(len(data) + 1)
        file.write_bytes(
            {
                "flip": lambda: flip(rng, data),
                "truncate": lambda: data[:at],
                "grow": lambda: data + rng.randbytes(rng.choice((1, 100, 5000))),
                "empty": lambda: b"",
                "zero": lambda: data[:at] + b"\0" * (len(data) - at),
            }[what]()
        )
        return f"{what} {file.name}"
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what != "remove":
        target = {"cycle": file.name, "absolute": "/etc/passwd", "dangling": "nothing"}
        file.symlink_to(target.get(what, "/dev/zero"))
    return f"{what} {file.name}"


def json_level(rng: random.Random, file: Path) -> str:
    """Change one value of a JSON file."""
    values = json.loads(file.read_bytes())
    place, key = values, None
    while True:
        if not place:
            break
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
        else:
            break
    what = rng.random()
    if key is None or what < 0.05:
        file.write_text(rng.choice(RAW))
    elif what < 0.2:
        del place[key]
        file.write_text(json.dumps(values))
    elif what < 0.3:
        place[key] = "MARK"
        file.write_text(json.dumps(values).replace('"MARK"', rng.choice(RAW)))
    elif what < 0.35 and isinstance(place, dict):
        place["MARK"] = place[key]
        file.write_text(json.dumps(values).replace('"MARK"', json.dumps(key)))
    else:
        place[key] = rng.choice(VALUES)
        file.write_text(json.dumps(values))
    return f"json {file.name} {str(key)[:40]}"


def safetensors_level(rng: random.Random, file: Path) -> str:
    """Change the header of a safetensors file, the rest staying what it was."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    name = rng.choice(list(header))
    entry = header[name]
    what = rng.choice(
        ("dtype", "shape", "offsets", "name", "drop", "add", "length", "value", "fit")
    )
    if what == "dtype":
        entry["dtype"] = rng.choice(("F32", "F16", "BF16", "U8", "I8", "F8_E4M3", "X", None, "U32"))
    elif what == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], [*shape, 0], [-n for n in shape], [1 << 62, 4], [], None,
             [n * 2 for n in shape], [1 << 40] * 8, [1] * 1000, [str(n) for n in shape], [1.0])
        )  # fmt: skip
    elif what == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([end, start], [start, end + 1], [start + 1, end], [0, 1 << 62], [-8, end], [start],
             [0, 0], [start, end, end], None, [0, end - start], [1 << 64, 1 << 65])
        )  # fmt: skip
    elif what == "name":
        header[rng.choice(NAMES)] = header.pop(name)
    elif what == "drop":
        del header[name]
    elif what == "add":
        header[rng.choice(NAMES)] = rng.choice((entry, {}, None, 3, {**entry, "x": 1}))
    elif what == "value":
        header[name] = rng.choice(VALUES)
    elif what == "fit":  # another type of the same size: consistent, but not what was meant
        entry["dtype"] = {"BF16": "F16", "F16": "BF16", "U8": "I8", "U32": "F32"}.get(
            entry["dtype"], "F32"
        )
    text = json.dumps(header).encode()
    size = len(text)
    if what == "length":
        size = rng.choice((0, 1, size - 1, size + 1, len(data), 1 << 40, 1 << 63, (1 << 64) - 1))
    file.write_bytes(struct.pack("<Q", size) + text + body)
    return f"safetensors {what} {name[:40]}"


def gguf_level(rng: random.Random, file: Path) -> str:
    """A GGUF file with one wrong metadata value, or wrong numbers in its header."""
    if rng.random() < 0.5:
        metadata = made.gguf_metadata(TINY_WIDE, "llama")
        key = rng.choice(list(metadata))
        value = rng.choice([v for v in VALUES if v not in (None, [], {}) and simple(v)])
        if isinstance(value, int) and not isinstance(value, bool):
            value &= (1 << 32) - 1
        if isinstance(value, float) and abs(value) > 1e38:
            value = 1e38
        if rng.random() < 0.2:
            del metadata[key]
        else:
            metadata[key] = value
        kind = rng.choice(("F16", "Q4_0", "Q8_0", "TQ2_0", "Q4_K"))
        made.write_gguf(file, TINY_WIDE, kind, metadata=metadata)
        return f"gguf {key}"
    data = bytearray(file.read_bytes())
    # Counts, lengths, types and offsets lie anywhere in the header: most of it is the tensors'.
    start = data.find(b"token_embd.weight") - 8 if rng.random() < 0.6 else 0
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(max(start, 0), min(len(data) - 8, max(start, 0) + 3000))
        number = rng.choice((0, 1, 2, 7, 36, 39, 255, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1))
        size = rng.choice((1, 4, 8))
        data[at : at + size] = struct.pack("<Q", number)[:size]
    file.write_bytes(data)
    return "gguf numbers"


def simple(value: Any) -> bool:
    """Whether GGUF can hold it."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, (int, str)) for v in value)
    return isinstance(value, (bool, int, float, str))


def index_level(rng: random.Random, file: Path) -> str:
    """An index that leads elsewhere."""
    values = json.loads(file.read_bytes())
    name = rng.choice(list(values["weight_map"]))
    values["weight_map"][name] = rng.choice(
        ("../model.safetensors", "/etc/passwd", "nothing.safetensors", "", 3, None, "a/b", "..")
    )
    file.write_text(json.dumps(values))
    return f"index {name}"


def spm_level(rng: random.Random, file: Path) -> str:
    """A sentencepiece model with damaged pieces."""
    file.write_bytes(flip(rng, file.read_bytes()))
    return "sentencepiece"


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
        model, _ = load_model(case / "out", lazy=True, get_model_classes=get_model_classes)
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
