"""The files beside the weights: config.json, tokenizer, index, report, model card, shim."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .files import dump_json, format_bytes, parse_json, write_file
from .from_safetensors import CONFIG_DTYPES, INDEX
from .plan import Plan
from .tokenizer_files import chat_template, end_tokens, finish_tokenizer
from .weights import Source

REPORT = "conversion_report.json"
SHIM = "delta_model.py"
# config.json entries of the source that would be wrong or foreign in the output.
LEFT_OUT = (
    "_name_or_path",
    "auto_map",
    "model_file",
    "quantization",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)
# No `from __future__ import annotations`: mlx-lm executes the file in a way that breaks
# dataclasses which have it.
SHIM_TEXT = '''"""Lets mlx-lm run this model with hybrid delta attention.

mlx_lm.generate --model DIRECTORY --trust-remote-code; needs the package mlx_delta.
"""

from pathlib import Path

from mlx_delta.models import {module}
from mlx_delta.models.common import arguments_in

Model = {module}.Model
ModelArgs = arguments_in(Path(__file__).parent, {module}.ModelArgs)

__all__ = ["Model", "ModelArgs"]
'''


def make_config(
    source: Source,
    plan: Plan,
    delta: Mapping[str, Any] | None,
    shim: bool,
    ends: list[int],
    activation_bits: int | None,
) -> dict[str, Any]:
    """The output's config.json.

    What loaders would otherwise take from defaults that differ is written out: tied embeddings,
    head_dim, kv heads, biases, both spellings of the rope settings.

    Args:
        source: The checkpoint.
        plan: What becomes of its weights.
        delta: The setting of hybrid delta attention; ``None`` for dense attention.
        shim: Whether mlx-lm is to load the model's class from a file in the directory.
        ends: Token ids that end a generation.
        activation_bits: Of ternary layers, in mlx_delta; other loaders leave activations alone.
    """
    arch = source.arch
    config = {key: value for key, value in source.config.items() if key not in LEFT_OUT}
    dtype = next(name for name, short in CONFIG_DTYPES.items() if short == plan.dtype)
    config |= {"dtype": dtype, "torch_dtype": dtype, **arch.entries()}
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if plan.quantization is not None:
        config["quantization"] = plan.quantization
    if plan.packed:
        # The scale multiplies, as mlx-lm's and Swift's BitNet take it.
        config["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        }
    if is_ternary(source):
        config["activation_bits"] = activation_bits
    config["delta"] = dict(delta) if delta is not None else None
    if shim:
        config["model_file"] = SHIM
    return dict(sorted(config.items()))


def is_ternary(source: Source) -> bool:
    """Whether all projections are ternary, so that the model was trained with int8 activations."""
    kinds = {source.weights[path + ".weight"].kind for path in source.arch.linears()}
    return kinds == {"ternary"}


def make_index(plan: Plan) -> dict[str, Any]:
    """model.safetensors.index.json."""
    weight_map = {
        spec.name: plan.shard_name(i)
        for i, shard in enumerate(plan.shards)
        for item in shard
        for spec in item.outputs
    }
    return {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}


def write_beside(
    folder: Path,
    source: Source,
    plan: Plan,
    delta: Mapping[str, Any] | None,
    shim: bool,
    activation_bits: int | None,
) -> list[str]:
    """Write everything but weights, report, card and index.

    Returns:
        What a user should know.
    """
    notes: list[str] = []
    files = finish_tokenizer(source.files, notes)
    ends = end_tokens(files, source.config, notes)
    config = make_config(source, plan, delta, shim, ends, activation_bits)
    generation = dict(parse_json(files.get("generation_config.json", b"{}"), "generation_config"))
    generation.pop("transformers_version", None)
    if ends:
        generation["eos_token_id"] = config["eos_token_id"]
    for name in ("bos_token_id", "pad_token_id"):
        if name not in generation and isinstance(config.get(name), int):
            generation[name] = config[name]
    files["generation_config.json"] = dump_json(generation)
    files["config.json"] = dump_json(config)
    if shim:
        module = "llama"
        if source.arch.model_type == "bitnet":
            module = "bitnet"
        elif config.get("activation_bits") is not None:
            module = "bitnet_llama"
        files[SHIM] = SHIM_TEXT.format(module=module).encode()
    for name, data in sorted(files.items()):
        write_file(folder / name, data)
    if chat_template(files) is None:
        notes.append("no chat template: prompts are passed to the model as they are")
    return notes


def make_report(
    source: Source,
    plan: Plan,
    shards: Mapping[str, Mapping[str, Any]],
    inputs: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """The report, without what is found out after the weights are written.

    No times, no paths of this machine: the same conversion gives the same bytes.
    """
    from mlx_delta.version import VERSION

    tensors = [entry for shard in shards.values() for entry in shard["tensors"]]
    return {
        "converter": f"mlx_delta {VERSION}",
        "mlx": version("mlx"),
        "source": {"name": source.name, "format": source.format, "files": inputs},
        "settings": dict(settings),
        "dtype": plan.dtype,
        "totals": {
            "tensors": len(tensors),
            "source_bytes": sum(entry["source_bytes"] for entry in tensors),
            "bytes": plan.nbytes,
            "changed": sum(bool(entry["error"]["largest"]) for entry in tensors),
        },
        "notes": [*source.notes, *plan.notes, *notes],
        "dropped": source.dropped,
        "tensors": tensors,
    }


def model_card(source: Source, plan: Plan, report: Mapping[str, Any], shim: bool) -> bytes:
    """README.md: what this is, how it was made, how to run it."""
    types: dict[tuple[str, str], list[int]] = {}
    for item in plan.items:
        totals = types.setdefault((item.weight.source_type, item.target_type), [0, 0])
        totals[0] += 1
        totals[1] += item.nbytes
    rows = "\n".join(
        f"| {old} | {new} | {count} | {format_bytes(size)} |"
        for (old, new), (count, size) in types.items()
    )
    stock = "mlx_lm.generate --model DIRECTORY --trust-remote-code -p 'Once upon a time'\n"
    check = report.get("verification") or {}
    found = f"\nCompared with the source: {check['summary']}.\n" if "summary" in check else ""
    target = report["settings"].get("target", "mac")
    return f"""---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- mlx_delta
---

# {source.name}, converted for MLX

Made by {report["converter"]} from a {source.format} checkpoint, for {target}:
{format_bytes(plan.nbytes)} of weights. `{REPORT}` has every tensor, its error and checksums.

| from | to | tensors | size |
|---|---|---|---|
{rows}
{found}
```
python -m mlx_delta.generate --model DIRECTORY --prompt 'Once upon a time'
{stock if shim else ""}```
""".encode()


def write_last(
    folder: Path, source: Source, plan: Plan, report: dict[str, Any], shim: bool
) -> None:
    """Write card and report and, last of all, the index: a directory that has it is complete."""
    write_file(folder / "README.md", model_card(source, plan, report, shim))
    write_file(folder / REPORT, dump_json(report))
    write_file(folder / INDEX, dump_json(make_index(plan)))
