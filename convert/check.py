"""Whether mlx-swift-lm, on iPads and iPhones, can load a directory: its loader's rules.

Taken from the source of https://github.com/ml-explore/mlx-swift-lm: MLXLMCommon/Load.swift
(which files, every key matched), MLXLMCommon/BaseConfiguration.swift (the ``quantization`` entry),
MLXLLM/Models/Llama.swift, Bitnet.swift and Gemma3Text.swift (types of config.json's values,
rope). Tokenizers are those of https://github.com/huggingface/swift-transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .architecture import Architecture, read_architecture
from .errors import ConvertError
from .files import read_json, regular_file
from .from_safetensors import INDEX
from .safetensors_io import Tensor, read_header

MODEL_TYPES = ("llama", "mistral", "bitnet", "gemma3_text")
FLOATS = ("F32", "F16", "BF16")
# Swift's decoder takes no whole number for a truth value, nor a string for a number.
WHOLE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
         "vocab_size")  # fmt: skip
OPTIONAL_WHOLE = ("head_dim", "max_position_embeddings", "num_key_value_heads",
                  "sliding_window", "sliding_window_pattern")  # fmt: skip
OPTIONAL_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "rope_traditional")
# Keys beside the layers that its quantization decoder skips.
QUANTIZATION_KEYS = ("group_size", "bits", "mode", "quant_method", "linear_class",
                     "quantization_mode")  # fmt: skip
TOKENIZERS = (
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "GPT2Tokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
)


def check_directory(folder: Path) -> list[str]:
    """The reasons why a directory would not load, or would compute something else; none is good."""
    problems: list[str] = []
    try:
        config = read_json(folder / "config.json")
        problems += _config_problems(config)
        problems += _tokenizer_problems(folder)
        tensors = _tensors(folder)
        if not problems:
            arch = read_architecture(config, "config.json", "lm_head.weight" in tensors)
            problems += _weight_problems(config, arch, tensors)
    except ConvertError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{folder} can't be read: {error}")
    return problems


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _config_problems(config: dict[str, Any]) -> list[str]:
    """Types of values, and settings that Swift's models do not compute."""
    problems = []
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        problems.append(f"model_type {str(model_type)[:60]!r} is not one of {MODEL_TYPES}")
    problems += [f"{key} must be a whole number" for key in WHOLE if not _is_whole(config.get(key))]
    for key in OPTIONAL_WHOLE:
        if config.get(key) is not None and not _is_whole(config[key]):
            problems.append(f"{key} must be a whole number")
    for key in OPTIONAL_FLAGS:
        if config.get(key) is not None and not isinstance(config[key], bool):
            problems.append(f"{key} must be true or false")
    if not _is_number(config.get("rms_norm_eps")):
        problems.append("rms_norm_eps must be a number")
    theta = config.get("rope_theta")
    for key in ("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"):
        if config.get(key) is not None and not _is_number(config[key]):
            problems.append(f"{key} must be a number")
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and theta is None and parameters.get("rope_theta"):
        problems.append("rope_parameters is not read: rope_theta would silently be 10000")
    end = config.get("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    if end is not None and not all(map(_is_whole, ends)):
        problems.append("eos_token_id must be a whole number or a list of them")
    problems += _rope_problems(config.get("rope_scaling"), model_type)
    if "quantization" in config:
        problems += _quantization_problems(config["quantization"])
    return problems


def _rope_problems(scaling: Any, model_type: Any) -> list[str]:
    """Of ``rope_scaling``."""
    if scaling is None:
        return []
    if not isinstance(scaling, dict):
        return ["rope_scaling must be an object"]
    problems = [
        f"rope_scaling has {key} {str(value)[:40]}: not a number or a string"
        for key, value in scaling.items()
        if not isinstance(value, str) and not _is_number(value)
    ]
    kind = scaling.get("type", scaling.get("rope_type"))
    known = ("linear",) if model_type == "bitnet" else ("linear", "dynamic", "llama3")
    if kind not in known:
        problems.append(f"rope_scaling has the type {str(kind)[:40]!r}; known are {known}")
    elif model_type == "bitnet" and "type" not in scaling:
        problems.append("rope_scaling must name its type under 'type'")
    if "factor" not in scaling:
        problems.append("rope_scaling lacks factor")
    return problems


def _quantization_problems(quantization: Any) -> list[str]:
    """Of ``quantization``: every key but a few is taken for a layer's path."""
    if not isinstance(quantization, dict):
        return ["quantization must be an object"]
    problems = []
    for key in ("group_size", "bits"):
        if not _is_whole(quantization.get(key)):
            problems.append(f"quantization lacks {key} as a whole number")
    for key, value in quantization.items():
        if key in QUANTIZATION_KEYS or isinstance(value, bool):
            continue
        good = isinstance(value, dict) and all(
            _is_whole(value.get(name)) for name in ("group_size", "bits")
        )
        if not good:
            problems.append(
                f"quantization has {key[:80]!r}, which needs whole numbers for group_size and bits"
            )
    return problems


def _tokenizer_problems(folder: Path) -> list[str]:
    """Of tokenizer.json and tokenizer_config.json."""
    problems = []
    contents = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            contents[name] = read_json(folder / name)
        except ConvertError as error:
            problems.append(str(error))
    if problems:
        return problems
    known = contents["tokenizer_config.json"].get("tokenizer_class")
    if not isinstance(known, str) or known.removesuffix("Fast") not in TOKENIZERS:
        problems.append(f"tokenizer_class {str(known)[:60]!r} is not known to swift-transformers")
    model = contents["tokenizer.json"].get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        problems.append(f"tokenizer.json holds a model of type {str(kind)[:40]!r} instead of BPE")
    return problems


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the files that its loader picks.

    Raises:
        ConvertError: There are none, or a file is broken.
    """
    files: list[Path] = []
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConvertError(f"{index} has no weight_map.")
        files = [folder / name for name in sorted({str(v) for v in weight_map.values()})]
        if not all(file.is_file() for file in files):
            files = []
    files = files or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ConvertError(f"{folder} has no model*.safetensors at its top level")
    tensors: dict[str, Tensor] = {}
    for file in files:
        regular_file(file)
        tensors |= read_header(file)
    return tensors


def _weight_problems(
    config: dict[str, Any], arch: Architecture, tensors: dict[str, Tensor]
) -> list[str]:
    """Keys, shapes and types: its loader wants each parameter once and nothing else."""
    problems = []
    quantization = config.get("quantization")
    linears = {path + ".weight" for path in arch.linears()}
    left = {name: t for name, t in tensors.items() if "self_attn.rotary_emb.inv_freq" not in name}
    if arch.model_type == "bitnet" and arch.tied:
        left.pop("lm_head.weight", None)  # its BitNet drops it; its Llama does not
    norm = tensors.get("model.norm.weight")
    for name, shape in arch.tensors().items():
        tensor = left.pop(name, None)
        path = name.rpartition(".")[0]
        if tensor is None:
            problems.append(f"{name} is missing")
            continue
        scales, biases = (left.pop(f"{path}.{part}", None) for part in ("scales", "biases"))
        if arch.model_type == "bitnet" and name in linears:
            scale = left.pop(name + "_scale", None)
            if tensor.dtype != "U8" or tensor.shape != (shape[0] // 4, shape[1]) or not scale:
                problems.append(f"{name}: BitNet layers must be packed, four codes a byte")
            elif norm is not None and scale.dtype != norm.dtype:
                problems.append(f"{name}_scale is {scale.dtype} but the norms are {norm.dtype}")
        elif scales is not None and name.endswith(".weight"):
            problems += _affine_problems(tensor, scales, biases, shape, quantization, path)
        elif tensor.shape != shape or tensor.dtype not in FLOATS:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {list(shape)}")
    problems += [f"{name[:120]} belongs to no layer" for name in left]
    return problems


def _affine_problems(
    codes: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    shape: tuple[int, ...],
    quantization: Any,
    path: str,
) -> list[str]:
    """Of a layer with scales: config.json must say how it is quantized."""
    if quantization is None:
        return [f"{path} has scales but config.json no quantization"]
    entry = quantization.get(path, quantization)
    if isinstance(entry, bool):
        return [f"{path} has scales but quantization says {entry}"]
    group_size, bits = entry["group_size"], entry["bits"]
    groups = (shape[0], shape[1] // group_size) if group_size > 0 else ()
    packed = (shape[0], shape[1] * bits // 32)
    if codes.dtype != "U32" or codes.shape != packed or scales.shape != groups:
        return [
            f"{path} does not have the shape of {bits} bits and group size {group_size}, which "
            "quantization says"
        ]
    if biases is None or biases.shape != scales.shape or scales.dtype not in FLOATS:
        return [f"{path} lacks biases that go with its scales"]
    return []
