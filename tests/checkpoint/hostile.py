"""Hostile model directories, and the process that loads a batch of them.

``python -m tests.checkpoint.hostile FOLDER FIRST LAST`` loads those cases and prints a JSON line
for each, so that the test sees where a process died.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = 10**30
DEEP: Any = 1
for _ in range(500):
    DEEP = [DEEP]
VALUES = (-1, 0, HUGE, 1.5, float("nan"), float("inf"), "x", [], {}, True, None, [None], 2**31)
NAMES = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_theta",
    "max_position_embeddings",
)  # fmt: skip
OTHER_CONFIG: tuple[dict[str, Any], ...] = (
    *({"model_type": x} for x in (
        None, 3, [], {}, "", "base", "../x", "os.path", "nothing", "x" * 999,
    )),
    *({"rope_scaling": x} for x in (
        3, "x", [], {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"type": 5},
        {"rope_type": "linear", "factor": "x"}, {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "unheard"}, {"type": "yarn", "factor": float("nan")},
        {"rope_type": "longrope", "short_factor": 1, "long_factor": 1,
         "original_max_position_embeddings": 5},
    )),
    *({"rope_parameters": x} for x in ([1], "x", {"rope_theta": 0}, {"rope_theta": "x"})),
    *({"layer_types": x} for x in (
        "x", [], [1, 2, 3], ["full_attention"], ["sliding_attention"] * 3,
    )),
    *({"quantization": x} for x in (
        3, [], {}, {"bits": 4}, {"bits": 0, "group_size": 64}, {"bits": HUGE, "group_size": 32},
        {"bits": 4, "group_size": 0}, {"bits": 4, "group_size": 32, "mode": "x"},
        {"bits": 4, "group_size": 32, "model.norm": {"bits": -1, "group_size": 1}},
    )),
    *({"quantization_config": x} for x in (
        3, [], {}, {"quant_method": 3}, {"quant_method": "awq"}, {"quant_method": "bitnet"},
        {"quant_method": "bitnet", "modules_to_not_convert": 3},
    )),
    *({"eos_token_id": x} for x in ("x", -1, HUGE, [None], {}, [[1]], 1.5)),
    *({"activation_bits": x} for x in (8, 3, "x", [])),
    {"tie_word_embeddings": "yes"}, {"attention_bias": 3}, {"sliding_window": -1},
    {"deep": DEEP}, {"bits": "9" * 3000}, {"text_config": 3}, {"architectures": 3},
    {"tie_word_embeddings": False}, {"model_file": "x.py"}, {"model_file": 3},
)  # fmt: skip
DELTAS: tuple[Any, ...] = (
    3, "x", [], True, [1], {"block_size": HUGE}, {"window": 10**9}, {"window": -64},
    {"sinks": 2**40}, {"threshold": HUGE * HUGE}, {"threshold": []}, {"threshold": {}},
    {"threshold": [[[]]]},
    {"threshold": DEEP}, {"threshold": "1"}, {"threshold": None}, {"threshold": float("nan")},
    {"threshold": [1.0] * 5000}, {"threshold": [[1.0] * 9] * 3}, {"threshold_mode": 3},
    {"threshold_mode": []}, {"keyframes": 0}, {"run_value": {}}, {"block_fraction": True},
    {"block_fraction": "x"}, {"key_bits": 8.0}, {"key_bits": [8]}, {"value_bits": HUGE},
    {"key_bits": 4, "block_size": 7, "window": 7}, {"": 1}, {"unheard": {}}, {"block_size": 0},
    {"block_size": True}, {"window": "64"}, {"sinks": 1e9}, None, {},
)  # fmt: skip
HEADER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda h: [h],
    "number": lambda h: 5,
    "entry": lambda h: {**h, "x": 3},
    "no offsets": lambda h: {**h, "x": {"dtype": "F32", "shape": [1]}},
    "offsets": lambda h: _set(h, data_offsets=["a", "b"]),
    "negative offsets": lambda h: _set(h, data_offsets=[-4, 4]),
    "backward offsets": lambda h: _set(h, data_offsets=[8, 4]),
    "huge offsets": lambda h: _set(h, data_offsets=[0, 2**63]),
    "overlap": lambda h: _set(h, data_offsets=[0, 4], shape=[1]),
    "type": lambda h: _set(h, dtype="F999"),
    "type is a number": lambda h: _set(h, dtype=3),
    "type is a list": lambda h: _set(h, dtype=[]),
    "other type": lambda h: _set(h, dtype="I32"),
    "bytes as bool": lambda h: _set(h, dtype="BOOL"),
    "shape": lambda h: _set(h, shape="x"),
    "negative shape": lambda h: _set(h, shape=[-1, -32]),
    "huge shape": lambda h: _set(h, shape=[2**40, 2**40]),
    "zero shape": lambda h: _set(h, shape=[0, 2**62]),
    "flat shape": lambda h: _set(h, shape=[h[FIRST]["data_offsets"][1] // 4]),
    "many dimensions": lambda h: _set(h, shape=[1] * 5000),
    "float shape": lambda h: _set(h, shape=[32.0]),
    "deep": lambda h: {**h, "x": DEEP},
    "metadata": lambda h: {**h, "__metadata__": 3},
    "metadata values": lambda h: {**h, "__metadata__": {"a": [1]}},
    "empty": lambda h: {},
    "a name left out": lambda h: {k: v for k, v in h.items() if k != FIRST},
    "another name": lambda h: {f"{k}x" if k == FIRST else k: v for k, v in h.items()},
}
FIRST = "model.embed_tokens.weight"
FILES: dict[str, bytes] = {
    "model.safetensors/empty": b"",
    "model.safetensors/short": b"\1\2",
    "model.safetensors/longer than it is": struct.pack("<Q", 2**62) + b"{}",
    "model.safetensors/not JSON": struct.pack("<Q", 4) + b"{{{{",
    "model.safetensors/not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "config.json/empty": b"",
    "config.json/bytes": b"\xff\xfe\0",
    "config.json/deep": b'{"a":' * 99_999 + b"1" + b"}" * 99_999,
    "config.json/digits": b'{"vocab_size": ' + b"9" * 9999 + b"}",
    "config.json/list": b"[1]",
    "generation_config.json/list": b"[1]",
    "generation_config.json/tokens": b'{"eos_token_id": {"a": 1}}',
    "generation_config.json/not JSON": b"\xff",
    "model.safetensors.index.json/list": b"[]",
    "model.safetensors.index.json/numbers": b'{"weight_map": {"a": 1, "b": 2}}',
    "model.safetensors.index.json/lists": b'{"weight_map": {"a": []}}',
    "model.safetensors.index.json/outside": b'{"weight_map": {"a": "../../etc/passwd"}}',
    "model.safetensors.index.json/deep": b"[" * 99_999,
    "model-99999-of-99999.safetensors/a name": b"",
    "tokenizer.json/empty": b"",
    "tokenizer.json/list": b"[]",
    "tokenizer.json/object": b"{}",
    "tokenizer.json/model": b'{"model": {"type": "BPE", "vocab": 3, "merges": 3}}',
    "tokenizer.json/deep": b'{"model":' * 9999 + b"1" + b"}" * 9999,
    "tokenizer_config.json/list": b"[]",
    "tokenizer_config.json/class": b'{"tokenizer_class": 3}',
    "tokenizer_config.json/unknown class": b'{"tokenizer_class": "Evil"}',
    "tokenizer_config.json/parser": b'{"tool_parser_type": "../../evil"}',
    "tokenizer_config.json/template module": b'{"chat_template_type": 3}',
    "tokenizer_config.json/template": b'{"chat_template": "{% for %}"}',
    "tokenizer_config.json/template is a number": b'{"chat_template": 3}',
    "tokenizer_config.json/eos": b'{"eos_token": {"a": 1}}',
    "tokenizer_config.json/code": b'{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}',
    "hf_quant_config.json/list": b"[]",
}


def _set(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**header, FIRST: {**header[FIRST], **changes}}


def cases() -> list[tuple[str, str, Any]]:
    """What to change: a readable id, the kind, and the change."""
    found: list[tuple[str, str, Any]] = []
    for name in NAMES:
        found += [(f"{name}={str(v)[:20]}", "config", {name: v}) for v in VALUES]
        found.append((f"{name} absent", "config", {name: ...}))
    found += [(f"{str(change)[:60]}", "config", change) for change in OTHER_CONFIG]
    found += [(f"delta={str(delta)[:50]}", "config", {"delta": delta}) for delta in DELTAS]
    found += [(f"header: {name}", "header", name) for name in HEADER]
    found += [(name, "file", name) for name in FILES]
    return found


def damage(folder: Path, kind: str, change: Any) -> None:
    """Change a whole checkpoint."""
    if kind == "config":
        config = {**json.loads((folder / "config.json").read_text()), **change}
        entries = {k: v for k, v in config.items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(entries))
    elif kind == "header":
        data = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(HEADER[change](json.loads(data[8 : 8 + length]))).encode()
        whole = struct.pack("<Q", len(header)) + header + data[8 + length :]
        (folder / "model.safetensors").write_bytes(whole)
    else:
        (folder / change.split("/")[0]).write_bytes(FILES[change])


def run(folder: Path) -> dict[str, Any]:
    """Load a directory and generate two tokens."""
    import mlx_delta

    try:
        model, tokenizer = mlx_delta.load(folder)
        mlx_delta.generate(model, tokenizer, [1, 2, 3] * 30, max_tokens=2)
    except BaseException as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None, "text": ""}


def main(folder: str, first: str, last: str) -> None:
    """Load the cases from ``first`` to before ``last``."""
    import logging

    logging.disable(logging.CRITICAL)
    for number in range(int(first), int(last)):
        print(json.dumps({"case": number, **run(Path(folder, str(number)))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
