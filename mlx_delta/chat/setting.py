"""Looking at and changing how a chat answers: the delta's setting, and how tokens are drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.config import DeltaConfig
from mlx_delta.models import MODELS
from mlx_delta.models.any import AnyDelta, apply, check_layers, remove
from mlx_delta.models.common import model_setting
from mlx_delta.models.queries import query_sensitivities
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.system.kv import kv_fields
from mlx_delta.wording import nearest

from .conversation import Conversation
from .options import Options

_OPTIONS = {field.name: type(field.default) for field in dataclasses.fields(Options)}
_FIELDS = {field.name for field in dataclasses.fields(DeltaConfig)}


def describe(conversation: Conversation) -> list[str]:
    """The setting, a line for each of its parts."""
    options = dataclasses.asdict(conversation.options)
    return [
        f"delta: {written(model_setting(conversation.model))}",
        "answers: " + ", ".join(f"{name}={value:g}" for name, value in options.items()),
        f"system: {conversation.system or 'none'}",
    ]


def written(delta: DeltaConfig | None) -> str:
    """A setting as the command line takes it."""
    if delta is None:
        return "off"
    if isinstance(delta.sensitivities, Sensitivities) and delta.sensitivities.file is None:
        delta = delta.changed(sensitivities=None)  # of a sample, made when the model was loaded
    return str(delta) or "the default setting"


def change(conversation: Conversation, text: str) -> None:
    """Change parts of it: ``temp=0.7``, ``kv=balanced``, ``window=128``, ``delta=off``, ``seed=1``.

    With another setting of the delta the conversation is fed anew when the next message comes.

    Raises:
        ValueError: A name is unknown or a value wrong; nothing is changed then.
    """
    parts = [part.strip() for part in text.replace(" ", ",").split(",") if part.strip()]
    options, fields, switch, seed = conversation.options, [], None, None
    kind: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is not of the form NAME=VALUE.")
        if name == "delta":
            if value not in ("on", "off"):
                raise ValueError(f"delta is on or off but got {value!r}.")
            switch = value
        elif name == "kv":
            if kind:
                raise ValueError("kv is given twice; drop one.")
            kind = kv_fields(value)
        elif name == "seed":
            seed = _number(name, value, int)
        elif name in _OPTIONS:
            options = dataclasses.replace(options, **{name: _number(name, value, _OPTIONS[name])})
        elif name in _FIELDS:
            fields.append(part)
        else:
            known = sorted({*_OPTIONS, *_FIELDS, "delta", "kv", "seed"})
            raise ValueError(f"unknown setting {name!r}{nearest(name, known)}.")
    for part in parts:
        if part.partition("=")[0] in kind:
            raise ValueError(f"kv and {part} both give {part.partition('=')[0]}; drop one.")
    if (fields or kind) and switch == "off":
        given = fields[0] if fields else "kv"
        raise ValueError(f"delta=off and {given} contradict each other; drop one.")
    if switch is not None or fields or kind:
        own = model_setting(conversation.model)
        wanted = None
        if switch != "off":
            base = own or conversation.setting_before or DeltaConfig()
            wanted = DeltaConfig.parse(",".join(fields), base.changed(**kind))
        if wanted != own:
            use_setting(conversation.model, conversation.tokenizer, wanted)
            try:
                conversation.forget()
            except ValueError:
                use_setting(conversation.model, conversation.tokenizer, own)
                raise
            conversation.setting_before = own
    conversation.options = options
    if seed is not None:
        mx.random.seed(seed)


def use_setting(model: nn.Module, tokenizer: TokenizerWrapper, setting: DeltaConfig | None) -> None:
    """Let a loaded model attend with another setting; caches of the old one are of no use then.

    Raises:
        ValueError: It does not fit the model's layers; nothing is changed then.
    """
    if not isinstance(model, tuple(module.Model for module in MODELS.values())):
        if setting is not None:
            apply(model, setting, tokenizer)
        elif isinstance(model, AnyDelta):
            remove(model)
        return
    if setting is not None:
        check_layers(model, setting)
    before = model.args.delta
    model.args.delta = setting
    if setting is not None and setting.cuts_runs and setting.sensitivities is None:
        try:
            found = query_sensitivities(model, tokenizer, setting)
        except BaseException:
            model.args.delta = before
            raise
        model.args.delta = setting.changed(sensitivities=found)


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what} but got {text!r}.") from error
