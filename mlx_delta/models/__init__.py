"""The models that attend with held keys, by the ``model_type`` of their config.json."""

from __future__ import annotations

from mlx_lm.utils import MODEL_REMAPPING

from mlx_delta.ternary.model import is_ternary_llama

from . import bitnet, bitnet_llama, llama

MODELS = {"llama": llama, "bitnet": bitnet}

# Their attention caches latents that stand for keys of all heads: there is no key to hold.
MLA_MODELS = frozenset(
    "bailing_hybrid bailing_moe_v3 deepseek_v3 deepseek_v32 glm4_moe_lite kimi_k3 kimi_linear "
    "longcat_flash mistral4".split()
)


def get_model_classes(config: dict) -> tuple[type, type]:
    """The model and argument classes for a config.json.

    Raises:
        ValueError: Its model_type has no delta model.
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
    if name not in MODELS:
        known = ", ".join(sorted(m for m in {*MODELS, *MODEL_REMAPPING} if _known(m)))
        raise ValueError(
            f"[load] model_type {model_type!r} has no delta model; there is one for {known}. "
            "Run it with mlx_lm, or pass delta=None (--no-delta)."
        )
    module = bitnet_llama if name == "llama" and is_ternary_llama(config) else MODELS[name]
    return module.Model, module.ModelArgs


def _known(model_type: str) -> bool:
    return MODEL_REMAPPING.get(model_type, model_type) in MODELS
