"""Prompt-cache files as nobody writes them: cut, flipped, and with a header that lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlx_delta.cache.sealed_file import NO_CHECKSUM

Header = dict[str, Any]


def split(content: bytes) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header (JSON values, or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def unsealed(content: bytes) -> bytes:
    """The same file as mlx-lm would have written it, without a checksum."""
    header, data = split(content)
    header["__metadata__"].pop("0.sha256", None)
    return join(header, data)


def flips(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The file with one bit changed, at places all over it."""
    rng = np.random.default_rng(seed)
    for bit in rng.choice(len(content) * 8, count, replace=False):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << (bit % 8)
        yield bytes(changed)


def strings_of(header: Header, data: bytes) -> dict[str, str]:
    """The strings among a file's arrays: the headers of held keys."""
    metadata = header["__metadata__"]
    names = [
        metadata[f"2.{i}.0"] for i in range(1, len(header)) if metadata.get(f"2.{i}.1") == "string"
    ]
    found = {}
    for name in names:
        begin, end = header[name]["data_offsets"]
        codes = np.frombuffer(data[begin:end], np.uint32 if end - begin else np.uint8)
        found[name] = "".join(map(chr, codes))
    return found


def with_string(content: bytes, name: str, text: str) -> bytes:
    """The file with another text in one of its string arrays."""
    header, data = split(content)
    begin, end = header[name]["data_offsets"]
    codes = np.array([ord(c) for c in text], np.int32).tobytes()
    grown = len(codes) - (end - begin)
    for key, entry in header.items():
        if key != "__metadata__":
            entry["data_offsets"] = [
                x + grown if x >= end and (x > begin or key != name) else x
                for x in entry["data_offsets"]
            ]
    header[name] = {
        "dtype": "I32",
        "shape": [len(text)],
        "data_offsets": [begin, begin + len(codes)],
    }
    return join(header, data[:begin] + codes + data[end:])


def lying_headers(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Files without a checksum whose header or metadata says something that is not so."""
    content = unsealed(content)
    _, data = split(content)

    def changed(change: Callable[[Header], Any]) -> bytes:
        header, _ = split(content)
        return join(change(header) or header, data)

    first = next(name for name in split(content)[0] if name != "__metadata__")
    meta = "__metadata__"
    entries: dict[str, Any] = {
        "no dtype": {"shape": [1], "data_offsets": [0, 4]},
        "unknown dtype": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]},
        "dtype a list": {"dtype": [], "shape": [1], "data_offsets": [0, 4]},
        "negative shape": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]},
        "huge shape": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]},
        "overflowing shape": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]},
        "shape of text": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]},
        "shape of floats": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        "shape of booleans": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        "many dimensions": {"dtype": "F32", "shape": [1] * 3000, "data_offsets": [0, 4]},
        "offsets swapped": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        "offsets negative": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]},
        "offsets far away": {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [1 << 40, (1 << 40) + 4],
        },
        "offsets of 10**30": {"dtype": "F32", "shape": [1], "data_offsets": [10**30, 10**30 + 4]},
        "one offset": {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        "no object": 5,
        "null": None,
    }
    for what, entry in entries.items():
        yield f"entry: {what}", changed(lambda h, entry=entry: h.update({first: entry}))
    yield "entry: missing", changed(lambda h: h.pop(first) and None)
    yield "entry: renamed", changed(lambda h: h.update({"0.9999": h.pop(first)}))
    for name in ("0.99999999999", "9999.0", "a.b", "", ".", "0." * 3000 + "0", "-1.0", "0.-1"):
        yield (
            f"tensor named {name[:12]!r}",
            changed(lambda h, name=name: h.update({name: h.pop(first)})),
        )
    metadata: dict[str, dict[str, Any]] = {
        "class of no cache": {"1.0": "load_prompt_cache"},
        "class of a module": {"1.0": "mx"},
        "class of the base": {"1.0": "_BaseCache"},
        "class of lists": {"1.0": "CacheList"},
        "class of batches": {"1.0": "BatchKVCache"},
        "class of arrays": {"1.0": "ArraysCache"},
        "class of chunks": {"1.0": "ChunkedKVCache"},
        "class of concatenation": {"1.0": "ConcatenateKVCache"},
        "class of dense keys": {"1.0": "KVCache"},
        "class of held keys": {"1.0": "DeltaKVCache"},
        "class of batched held keys": {"1.0": "BatchDeltaKVCache"},
        "class of windows": {"1.0": "RotatingKVCache"},
        "class of codes": {"1.0": "QuantizedKVCache"},
        "class with dots": {"1.0": "os.system"},
        "class empty": {"1.0": ""},
        "one class too many": {"1.77": "KVCache"},
        "class far away": {"1.99999999999": "KVCache"},
        "metadata far away": {"0.99999999999": "x"},
        "metadata nested": {"0" + ".a" * 4000: "x"},
        "scalar of unknown kind": {"2.1.1": "pickle"},
        "scalar elsewhere": {"2.1.0": "7.7"},
        "scalar far away": {"2.99999999999.0": "x"},
        "scalar no pair": {"2.1.2": "x"},
        "scalar not a scalar": {"2.1.0": first, "2.1.1": "scalar"},
        "scalar as string": {"2.1.0": first, "2.1.1": "string"},
        "scalar as none": {"2.1.0": first, "2.1.1": "none"},
        "checksum empty": {"0.sha256": ""},
        "checksum wrong": {"0.sha256": NO_CHECKSUM},
        "checksum long": {"0.sha256": "0" * 100_000},
        "checksum twice": {"0.sha256": NO_CHECKSUM, "0.x": f'","0.sha256":"{NO_CHECKSUM}'},
        "value a number": {"0.model": 5},
        "value an object": {"0.model": {"a": "b"}},
        "value null": {"0.model": None},
        "unknown key": {"tokenizer_config": "{}"},
        "unknown index": {"3.0": "x"},
        "emoji": {"0.model": "\U0001f600" * 1000},
    }
    for what, values in metadata.items():
        yield f"metadata: {what}", changed(lambda h, values=values: h[meta].update(values))
    yield "metadata: none", changed(lambda h: h.pop(meta) and None)
    yield "metadata: a list", changed(lambda h: h.update({meta: []}))
    yield "metadata: text", changed(lambda h: h.update({meta: "x"}))
    for i in range(3):
        yield (
            f"metadata: part {i} missing",
            changed(
                lambda h, i=i: h.update(
                    {meta: {k: v for k, v in h[meta].items() if not k.startswith(f"{i}.")}}
                )
            ),
        )
    yield "header: a list", join([], data)
    yield "header: null", join(b"null", data)
    yield "header: deep", join(b"[" * 100_000 + b"]" * 100_000, data)
    yield "header: deep objects", join(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, data)
    yield "header: no JSON", join(b"\x00" * 64, data)
    yield "header: no UTF-8", join(b'{"\xff": 1}', data)
    yield "header: NaN", join(b'{"__metadata__": NaN}', data)
    yield "header: twice the same", join(b'{"a": 1, "a": 2}', data)
    yield "header: empty object", join(b"{}", b"")
    yield "header: digits", join(b'{"a": ' + b"9" * 5000 + b"}", data)
    yield "length: beyond the end", struct.pack("<Q", 1 << 40) + content[8:]
    yield "length: the largest", b"\xff" * 8 + content[8:]
    yield "length: zero", bytes(8) + content[8:]
    yield "data: more", content + b"\x00" * 100
    yield "no bytes", b""


def hostile_states(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Files without a checksum whose held keys come with a header that lies."""
    content = unsealed(content)
    header, data = split(content)
    name, text = next(iter(strings_of(header, data).items()))
    state = json.loads(text)
    config = state["config"]
    values: list[Any] = [None, -1, 10**30, 1.5, "x", [], {}, True, [10**9], [None], [-5], ["a"]]
    for key in state:
        for value in values:
            yield f"{key}={value!r}", with_string(content, name, json.dumps({**state, key: value}))
        rest = {k: v for k, v in state.items() if k != key}
        yield f"no {key}", with_string(content, name, json.dumps(rest))
    for key in config:
        for value in (None, -1, 10**30, "x", [], 3, 0):
            lie = {**state, "config": {**config, key: value}}
            yield f"config.{key}={value!r}", with_string(content, name, json.dumps(lie))
    for odd in ("", "null", "[]", "{", "[" * 100_000, '{"version": 1}', "\ud800"):
        yield f"text {odd[:12]!r}", with_string(content, name, odd)
