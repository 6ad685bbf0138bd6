"""Ways to damage a checkpoint's files, and values that no writer would write."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

from . import checkpoints as made

TINY_WIDE = made.LLAMA | {
    "num_hidden_layers": 1,
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
}
# What readers look for but the small checkpoints lack.
KEYS = (
    "layer_types rope_scaling rope_parameters quantization_config quantization num_experts dtype "
    "torch_dtype delta attention_bias mlp_bias num_local_experts activation_bits sliding_window "
    "sliding_window_pattern rope_local_base_freq query_pre_attn_scalar final_logit_softcapping "
    "hidden_activation model_file auto_map chat_template added_tokens_decoder tokenizer_class "
    "eos_token_id bos_token_id pad_token_id added_tokens model weight_map metadata"
).split()
DELTAS: list[Any] = [
    {"block_size": 10**30}, {"window": 10**9}, {"threshold": 1e308}, {"threshold": -1},
    {"window": -64}, {"window": "64"}, {"threshold": [0.5]}, {"threshold": {"a": 1}},
    {"block_size": 0}, {"x": 1}, {"key_bits": 9}, {"key_bits": True}, {"kind": "x"}, [], [1], 5,
    "off", True, {"window": None}, {"threshold": None}, {"sinks": 1 << 62}, {"value_bits": "4"},
    {"block_size": 1e30},
]  # fmt: skip

NUMBERS: list[Any] = [None, -1, 0, 1, 2, 3, 63, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64]
VALUES: list[Any] = [
    *NUMBERS, True, False, 1.5, -0.0, 1e308, "", "x", "..", "../../evil", "/etc/passwd", "\0",
    "x" * 100_000, [], {}, [[]], {"a": {}}, [None], ["x"], [1, 2, 3], {"rope_type": "llama3"},
    "float16", "bitnet", "affine", "4", 5, [[[[]]]], {"full_attention": 3}, ["full_attention"],
    {"0": 1}, {"99999": {}}, [1 << 40], [-1], 10**30,
]  # fmt: skip
RAW = [
    '{"a":' * 900 + "1" + "}" * 900,
    "[" * 500 + "]" * 500,
    "NaN",
    "Infinity",
    "-1e999",
    "1" * 5000,
    "[" * 100_000,
    '{"a":' * 5000,
    "'",
    '"\\ud800"',
    "",
]
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
    if what > 0.8 and isinstance(values, dict):
        key = rng.choice(KEYS)
        values[key] = rng.choice(DELTAS if key == "delta" else VALUES)
        file.write_text(json.dumps(values))
    elif key is None or what < 0.05:
        file.write_text(rng.choice(RAW))
    elif what < 0.2:
        del place[key]
        file.write_text(json.dumps(values))
    elif what < 0.25:
        place[key] = "MARK"
        file.write_text(json.dumps(values).replace('"MARK"', rng.choice(RAW)))
    elif what < 0.3 and isinstance(place, dict):
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
        key = rng.choice([*metadata, *GGUF_KEYS])
        value = rng.choice([v for v in VALUES if v not in (None, [], {}) and simple(v)])
        if isinstance(value, int) and not isinstance(value, bool):
            value &= (1 << 32) - 1
        if isinstance(value, float) and abs(value) > 1e38:
            value = 1e38
        if rng.random() < 0.2:
            metadata.pop(key, None)
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


GGUF_KEYS = (
    "split.count split.no general.alignment llama.rope.scaling.type llama.rope.scaling.factor "
    "llama.rope.scaling.original_context_length llama.rope.scale_linear llama.expert_count "
    "llama.rope.scaling.attn_factor llama.attention.value_length tokenizer.chat_template "
    "tokenizer.ggml.pre tokenizer.ggml.merges tokenizer.ggml.eot_token_id "
    "tokenizer.ggml.eom_token_id tokenizer.ggml.add_bos_token tokenizer.ggml.add_space_prefix"
).split()


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
