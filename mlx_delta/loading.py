"""Loading a model and its tokenizer, with checks that name what is wrong before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING, load_model

from .checkpoint.adapters import apply_adapters
from .checkpoint.catalogue import CATALOGUE
from .checkpoint.config import check_config, check_generation_config, read_config
from .checkpoint.find import BUNDLED, find_model
from .checkpoint.json_file import one_line
from .checkpoint.safetensors_header import read_header
from .checkpoint.tokenizer import check_vocabulary, read_tokenizer
from .checkpoint.weights import (
    check_finite,
    check_layers,
    check_memory,
    check_types,
    read_headers,
)
from .config import DeltaConfig
from .models import MODELS, get_model_classes
from .models.any import attend_with
from .models.common import read_delta
from .models.float_layers import use_float_products
from .models.queries import query_sensitivities
from .models.sharing import share
from .sensitivities import Sensitivities
from .system.devices import has_gpu
from .system.memory import free_memory
from .system.threads import choose_threads
from .ternary.model import loading_overrides

__all__ = [
    "BUNDLED",
    "DEMO",
    "MODEL_HELP",
    "MODEL_SETTING",
    "find_model",
    "has_gpu",
    "load",
    "read_config",
    "read_setting",
    "with_sensitivities",
]

DEMO = "demo"
MODEL_HELP = (
    "A directory, a Hugging Face repository, a bundled model, or a name whose model is fetched "
    f"once ({', '.join(sorted(CATALOGUE))})."
)

# The delta argument's default: the setting that the model's config.json holds.
MODEL_SETTING: Literal["model"] = "model"

# Of the memory that is free, what float32 values of quantized weights may take: the rest is for
# caches and activations.
KEPT_SHARE = 0.5


def load(
    path_or_hf_repo: str | Path = DEMO,
    delta: DeltaConfig | Mapping[str, Any] | None | Literal["model"] = MODEL_SETTING,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tensor_group: mx.distributed.Group | None = None,
    pipeline_group: mx.distributed.Group | None = None,
) -> tuple[Any, ...]:
    """Load a model that attends with the delta, and its tokenizer.

    Without a GPU the weights are converted to float32: other types have no fast product there.
    Quantized ones keep float32 values beside them where half the free memory holds these.

    Args:
        path_or_hf_repo: A bundled model's name (``"demo"``), a directory, a Hugging Face
            repository, or a name of the catalogue (``"smollm2"``), whose model is fetched and
            converted when it is first asked for.
        delta: The setting, or its fields as a dict; ``None`` for dense attention. When not given,
            the one in the model's config.json, or the default one if there is none.
        tokenizer_config: Passed to mlx-lm's ``load_tokenizer``.
        model_config: Entries that replace those of config.json; ``{"activation_bits": None}``
            leaves a BitNet's activations in floating point.
        adapter_path: LoRA adapters to apply, mlx-lm's or PEFT's.
        lazy: Leave the weights unread, and their values unchecked, until they are needed.
        return_config: Return the model's configuration as well.
        revision: Revision of the repository.
        trust_remote_code: Let the tokenizer, and a dense model, run code of their own. No file
            can switch this on.
        tensor_group: Of several processes (``mx.distributed.init()``): each keeps its share of
            every layer's heads, and their delta.
        pipeline_group: Of several processes: each keeps some of the layers. As mlx-lm's
            ``sharded_load``, whose arguments these two are.

    Returns:
        The model and the tokenizer, and the configuration if asked for.

    Raises:
        FileNotFoundError: There is no such model, or a file of it is missing.
        ValueError: A file is broken, or the model is of a kind that can't hold keys.
        MemoryError: The weights are larger than the memory that is free.
    """
    for name, value in (("tokenizer_config", tokenizer_config), ("model_config", model_config)):
        if not isinstance(value, (Mapping, type(None))):
            raise ValueError(f"[load] {name} must be a dict or None but got {value!r}.")
    shared = tensor_group is not None or pipeline_group is not None
    if shared and adapter_path is not None:
        raise ValueError("[load] adapter_path does not go together with several processes.")
    given = None if _is_model_setting(delta) else _as_setting(delta)
    path = find_model(path_or_hf_repo, revision)
    entries = {**read_config(path), **(model_config or {})}
    is_ours = _is_ours(entries)
    check_config(entries, is_ours)
    check_generation_config(path)
    tensors = read_headers(path)
    check_layers(tensors, entries)
    check_memory(path, tensors, widened=not has_gpu())
    if _is_model_setting(delta):
        setting = read_setting(path, entries)
    else:
        setting = None if given is None else with_sensitivities(path, given)

    overrides = {**(model_config or {}), **_tied(entries, tensors)}
    options: dict[str, Any] = {"model_config": overrides, "trust_remote_code": trust_remote_code}
    if setting is not None or is_ours:
        # Our classes stand in for a model_file, which would need trust_remote_code to run.
        overrides |= {"delta": setting, "model_file": None}
        overrides |= loading_overrides({**entries, **overrides})
        options = {"model_config": overrides, "get_model_classes": get_model_classes}
    model, config = _build(path, options)
    if setting is not None:
        config["delta"] = setting.to_dict()
        attend_with(model, setting)
    if shared:
        share(model, tensor_group, pipeline_group)
    check_types(model)
    if not has_gpu():
        choose_threads()
        model.set_dtype(mx.float32)
    if not lazy and hasattr(model, "check_weights"):
        model.check_weights()
    if adapter_path is not None:
        apply_adapters(model, adapter_path)
    if not lazy:
        mx.eval(model.parameters())
        check_finite(model)
    if not has_gpu():
        use_float_products(model, 0 if lazy else int(KEPT_SHARE * free_memory()[0]))
    tokenizer = read_tokenizer(
        path, tokenizer_config or {}, config.get("eos_token_id"), trust_remote_code
    )
    if (rows := _embedding_rows(model)) is not None:
        check_vocabulary(tokenizer, path, rows)
    if setting is not None and setting.cuts_runs and setting.sensitivities is None and not lazy:
        found = query_sensitivities(model, tokenizer, setting)
        model.args.delta = setting.changed(sensitivities=found)
    if shared:
        # So that none begins, and waits for the others, while these still read their weights.
        mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def read_setting(path: Path, config: Mapping[str, Any]) -> DeltaConfig | None:
    """The setting of a model's directory: that of its config.json, or the default one.

    Args:
        path: The directory.
        config: What its config.json holds.

    Returns:
        ``None`` where the file asks for dense attention.

    Raises:
        FileNotFoundError: The file of its sensitivities is missing.
        ValueError: The setting is broken, or that file is.
    """
    delta = read_delta(config.get("delta", DeltaConfig()))
    return None if delta is None else with_sensitivities(path, delta)


def with_sensitivities(path: Path, delta: DeltaConfig) -> DeltaConfig:
    """The setting with its sensitivities read, where it only names their file."""
    name = delta.sensitivities
    if not isinstance(name, str):
        return delta
    if Path(name).name == name and (path / name).is_file():
        read_header(path / name)
    return delta.changed(sensitivities=Sensitivities.find(path, name))


def _as_setting(delta: Any) -> DeltaConfig | None:
    """The argument ``delta`` of ``load``: a setting, its fields, or ``None``."""
    if not isinstance(delta, (DeltaConfig, Mapping, type(None))):
        raise ValueError(
            "[load] delta must be a DeltaConfig, a dict of its fields, None or 'model' but got "
            f"{delta!r}."
        )
    return read_delta(delta)


def _is_model_setting(delta: Any) -> bool:
    return isinstance(delta, str) and delta == MODEL_SETTING


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a class of ours builds this kind of model."""
    kind = config.get("model_type")
    return isinstance(kind, str) and MODEL_REMAPPING.get(kind, kind) in MODELS


def _tied(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the embedding is the head, where config.json does not say: mlx-lm takes it for tied.

    transformers leaves entries out that have its own default, and that is not to tie for some
    architectures; so the weights decide.
    """
    has_head = any(name.startswith("lm_head.") for name in tensors)
    if "tie_word_embeddings" in config or not has_head:
        return {}  # as it says, or mlx-lm's default for the architecture
    return {"tie_word_embeddings": False}


def _build(path: Path, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's ``load_model``, which builds from the configuration without checking it."""
    file = path / "config.json"
    try:
        return load_model(path, lazy=True, **options)
    except (FileNotFoundError, MemoryError):
        raise
    except ValueError as error:
        text = one_line(error)
        raise ValueError(text if text.startswith("[load]") else f"[load] {path}: {text}") from error
    except Exception as error:  # a model's own code meets whatever stands in a file
        if "memory" in str(error).lower():
            raise MemoryError(f"[load] {path}: {one_line(error)}") from error
        raise ValueError(
            f"[load] {file} does not describe a model that can be built: {one_line(error)}."
        ) from error


def _embedding_rows(model: nn.Module) -> int | None:
    """Tokens that the embedding has, where it stands under its usual name."""
    for name, module in model.named_modules():
        if name.endswith("embed_tokens") and "weight" in module:
            return int(module.weight.shape[0])
    return None
