"""The models that attend with held keys, by the ``model_type`` of their config.json."""

from __future__ import annotations

from mlx_lm.utils import MODEL_REMAPPING, _get_classes

from mlx_delta.ternary.model import is_ternary_llama

from . import bitnet, bitnet_llama, llama
from .common import normalize_rope

# Those that have the delta built in. To all others it is applied, by ``any.py``.
MODELS = {"llama": llama, "bitnet": bitnet}

# Their attention caches latents that stand for keys of all heads: there is no key to hold.
MLA_MODELS = frozenset(
    "bailing_hybrid bailing_moe_v3 deepseek_v3 deepseek_v32 glm4_moe_lite kimi_k3 kimi_linear "
    "longcat_flash mistral4".split()
)


def get_model_classes(config: dict) -> tuple[type, type]:
    """The model and argument classes for a config.json of a model that is to hold keys.

    Raises:
        ValueError: It has no keys to hold, or mlx-lm has no such model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(
            f"[load] model_type must be a string in config.json but got {model_type!r}."
        )
    name = MODEL_REMAPPING.get(model_type, model_type)
    if name in MLA_MODELS:
        raise ValueError(
            f"[load] model_type {model_type!r} caches latents instead of keys (multi-head latent "
            "attention), which can't be held; run it with mlx_lm, or pass delta=None (--no-delta)."
        )
    if not has_class(config):
        return _mlx_lm_classes(config)
    module = bitnet_llama if name == "llama" and is_ternary_llama(config) else MODELS[name]
    return module.Model, module.ModelArgs


def has_class(config: dict) -> bool:
    """Whether a config.json's model has the delta built in; to others it is applied."""
    model_type = str(config.get("model_type"))
    return MODEL_REMAPPING.get(model_type, model_type) in MODELS


def _mlx_lm_classes(config: dict) -> tuple[type, type]:
    """mlx-lm's own classes, with arguments that take rope settings in either spelling."""
    model, arguments = _get_classes(config)
    read = arguments.from_dict
    entrance = {"from_dict": staticmethod(lambda params: read(normalize_rope(params)))}
    return model, type(arguments.__name__, (arguments,), entrance)
