"""Runs of lm-evaluation-harness's tasks on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlx_delta.evaluate.harness import HarnessOptions, run_harness
from mlx_delta.measure.settings import Setting, parse_setting
from tests.tiny import SMALL

SETTINGS = ("dense", "delta", "delta:key_format=codes,key_bits=4,value_bits=16")


def setting(name: str) -> Setting:
    return parse_setting(name, SMALL)


def run(
    model: Any, tokenizer: Any, name: str, task: str, data: Path, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A task's results, and the answers by key."""
    options = dataclasses.replace(HarnessOptions(data_dir=data, max_gen_toks=6), **changes)
    done: dict[str, Any] = {}
    results = run_harness(model, tokenizer, setting(name), task, options, done, lambda: None)
    return results, json.loads(json.dumps(done))["answers"]
