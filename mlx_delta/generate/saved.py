"""Prompt caches between runs: whose model and which setting they are of, and writing new ones.

A file says which model and setting it was made with. It is believed only as far as the command
line agrees: it never chooses a model that is not here, nor anything that lets code run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mlx_delta.cache import HeldKeys, prompt_file
from mlx_delta.cache.check_state import leaves
from mlx_delta.cache.sealed_file import CHECKSUM
from mlx_delta.checkpoint.catalogue import CATALOGUE
from mlx_delta.checkpoint.obtain import is_here, place
from mlx_delta.config import DeltaConfig
from mlx_delta.loading import BUNDLED, DEMO
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.system.arguments import delta_fields, flag_of_field

from . import make_caches


@dataclasses.dataclass(frozen=True)
class Fed:
    """Tokens that were fed before the answer's first step, and the seconds it took."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Fed) -> Fed:
        """What was fed one after the other."""
        return Fed(self.tokens + other.tokens, self.seconds + other.seconds)


def open_caches(args: argparse.Namespace) -> tuple[list[Any] | None, dict[str, str]]:
    """The caches of --prompt-cache-file with what the file says of them; none without the flag.

    Raises:
        ValueError: The file is broken, or a flag contradicts it.
        FileNotFoundError: There is no such file.
    """
    if args.prompt_cache_file is None:
        return None, {}
    file = args.prompt_cache_file
    caches, metadata = prompt_file.load(file)
    if CHECKSUM not in metadata:
        print(f"note: {file} has no checksum: damage to it could go unnoticed.", file=sys.stderr)
    check_flags_agree(args, caches)
    adapter = metadata.get("adapter_path")
    if adapter is not None and adapter != (args.adapter_path or ""):
        made = f"--adapter-path {adapter}" if adapter else "no --adapter-path"
        raise ValueError(f"{file} was made with {made}; give the same here.")
    return caches, metadata


def choose_model(args: argparse.Namespace, caches: Any, metadata: dict[str, str]) -> str:
    """The model to load: the one asked for, or that of the prompt cache if it is here.

    Raises:
        ValueError: The two are not the same, or the cache's would have to be fetched.
    """
    if caches is None:
        return DEMO if args.model is None else str(args.model)
    named = metadata.get("model")
    if args.model is not None:
        if named is not None and not same_model(args.model, named):
            raise ValueError(
                f"--model {args.model} is not the model of the prompt cache ({named!r}); use "
                "that model, or another cache."
            )
        return str(args.model)
    if named is None:
        raise ValueError(f"{args.prompt_cache_file} names no model; give --model.")
    if not (_bundled(named) or is_here(named) or Path(named).expanduser().is_dir()):
        raise ValueError(
            f"{args.prompt_cache_file} names the model {named!r}, which is not here; give --model "
            "to load it."
        )
    print(f"note: the model is {named!r}, which the prompt cache names.", file=sys.stderr)
    return named


def _bundled(name: str) -> bool:
    return Path(name).name == name and (BUNDLED / name).is_dir()


def same_model(name: str, other: str) -> bool:
    """Whether two names are of one model: equal, or paths of one directory."""
    if name == other:
        return True
    if _bundled(name) or _bundled(other):
        return False
    paths = _directory(name), _directory(other)
    return all(path.is_dir() for path in paths) and paths[0].samefile(paths[1])


def _directory(name: str) -> Path:
    """What a name means if it is no hub name: a directory, or a catalogued model's."""
    path = Path(name).expanduser()
    return place(name) if name in CATALOGUE and not path.is_dir() else path


def setting_of(caches: Sequence[Any], args: Any = None) -> DeltaConfig | None:
    """The setting that caches work with; ``None`` if they hold no keys.

    Thresholds and sensitivities of single layers become one list again; layers without held keys
    (sliding windows) take the first layer's, which they do not use.

    Args:
        caches: The caches of a model, one per layer.
        args: The model's arguments: its sensitivities, if the caches have the same, come with
            their curve and the name of their file.
    """
    configs = [c.config if isinstance(c, HeldKeys) else None for c in caches]
    first = next((config for config in configs if config is not None), None)
    if first is None:
        return None
    found = [(config or first).layer_threshold for config in configs]
    same = len(set(found)) == 1 and not isinstance(found[0], tuple)
    threshold = found[0] if same else tuple(found)
    first = _with_joined_widths(first, configs)
    if first.threshold is not None:
        return dataclasses.replace(first, threshold=threshold)
    own = getattr(getattr(args, "delta", None), "sensitivities", None)
    if first.key_format == "codes" and isinstance(own, Sensitivities):
        return _unwritten(dataclasses.replace(first, sensitivities=own)) or first
    if not isinstance(first.sensitivities, Sensitivities):
        return first
    each = [(c or first).loaded_sensitivities for c in configs]
    joined = Sensitivities([x.layers[0] for x in each], salience=[x.salience[0] for x in each])
    if isinstance(own, Sensitivities) and len(own.layers) == len(each):
        if all(own.for_layer(i, len(each)) == x for i, x in enumerate(each)):
            joined = own
    whole = dataclasses.replace(first, sensitivities=joined)
    return _unwritten(whole) or whole


def _unwritten(setting: DeltaConfig) -> DeltaConfig | None:
    """The setting without widths, if its sensitivities choose the same; ``None`` if not."""
    chosen = dataclasses.replace(setting, key_widths=None, value_widths=None)
    return chosen if _widths(chosen.with_widths()) == _widths(setting) else None


def _with_joined_widths(first: DeltaConfig, configs: Sequence[DeltaConfig | None]) -> DeltaConfig:
    """The first layer's setting with the widths of codes of all of them."""
    fields: dict[str, Any] = {}
    for name in ("key_widths", "value_widths"):
        if getattr(first, name) is not None:
            own = [None if c is None else getattr(c, name) for c in configs]
            fields[name] = tuple(None if widths is None else widths[0] for widths in own)
    return dataclasses.replace(first, **fields) if fields else first


def _widths(config: DeltaConfig) -> tuple[Any, Any]:
    return config.key_widths, config.value_widths


def check_flags_agree(args: argparse.Namespace, caches: Sequence[Any]) -> None:
    """Refuse flags of the delta that say something else than the caches.

    Raises:
        ValueError: Which flag, and what the caches were made with.
    """
    setting, given = setting_of(caches), delta_fields(args)
    if args.no_delta and setting is not None:
        raise ValueError("--no-delta contradicts the prompt cache, which was made with the delta.")
    if setting is None:
        if given or args.delta_paper:
            name = flag_of_field(args, next(iter(given))) if given else "--delta-paper"
            raise ValueError(f"{name} contradicts the prompt cache, made without the delta.")
        return
    wanted = dict(given)
    if args.delta_paper:
        paper = vars(DeltaConfig.paper())
        # The size of its blocks came from the prompt.
        free = ("block_size", "block_fraction", "key_bits", "value_bits")
        wanted = {**{k: v for k, v in paper.items() if k not in free}, **given}
    for name, value in wanted.items():
        made = getattr(setting, name)
        if value != made:
            shown = flag_of_field(args, name) if name in given else "--delta-paper"
            if name in given and not shown.startswith("--kv "):
                shown += f" {value}"
            raise ValueError(
                f"{shown} contradicts the prompt cache, which was made with {name}={made}; leave "
                "the flag out, or make the cache anew."
            )


def check_model_fits(model: nn.Module, caches: Sequence[Any]) -> None:
    """Refuse caches of another kind or shape than the model makes.

    Raises:
        ValueError: The first layer that differs.
    """
    fresh = make_caches(model, 1)
    if len(fresh) != len(caches):
        raise ValueError(
            f"the prompt cache has {len(caches)} layers but the model has {len(fresh)}."
        )
    mx.eval(model(mx.array([[0]]), cache=fresh))
    for i, (own, cache) in enumerate(zip(leaves(fresh), leaves(caches), strict=False)):
        grown = isinstance(own, KVCache) and isinstance(cache, (QuantizedKVCache, RotatingKVCache))
        if type(own) is not type(cache) and not grown:
            raise ValueError(
                f"the prompt cache has a {type(cache).__name__} in layer {i} but the model makes "
                f"a {type(own).__name__}."
            )
        if _shape(own) != _shape(cache):
            raise ValueError(
                f"the prompt cache is of kv heads and head dimensions {_shape(cache)} in layer "
                f"{i} but the model has {_shape(own)}."
            )


def _shape(cache: Any) -> Any:
    """Kv heads and the dimensions of a key and a value; what arrays there are, of other kinds."""
    if isinstance(cache, HeldKeys):
        return cache._model
    keys: Any = getattr(cache, "keys", None)
    values: Any = getattr(cache, "values", None)
    if isinstance(cache, QuantizedKVCache):
        return (keys[0].shape[1], *(x[1].shape[3] * cache.group_size for x in (keys, values)))
    if keys is not None and values is not None:
        return (keys.shape[1], keys.shape[3], values.shape[3])
    return [getattr(x, "shape", None) for x in getattr(cache, "cache", [])]


def feed(model: nn.Module, tokens: list[int], caches: list[Any], options: dict[str, Any]) -> None:
    """Put tokens into caches without an answer."""
    names = ["prefill_step_size", "kv_bits", "kv_group_size", "quantized_kv_start"]
    names.append("prompt_progress_callback")
    known = {name: options[name] for name in names if name in options}
    if tokens:
        for _ in generate_step(mx.array(tokens), model, max_tokens=0, prompt_cache=caches, **known):
            pass


def save_prompt(
    write: Callable[[list[Any]], None],
    model: nn.Module,
    tokens: list[int],
    rest: list[int],
    caches: list[Any],
    options: dict[str, Any],
    draft_caches: list[Any],
) -> tuple[list[int], Fed]:
    """Prefill the prompt, write its caches, and return the tokens still to be fed.

    Args:
        write: Writes caches to the file.
        model: The model.
        tokens: What the file holds.
        rest: What comes after it before the answer. Without any, the last of ``tokens`` is left
            out of ``caches``, since its logits begin the answer.
        caches: The model's; filled.
        options: mlx-lm's.
        draft_caches: The draft model's, if there is one; filled, and not part of the file.
    """
    start = time.perf_counter()
    body = tokens if rest else tokens[:-1]
    feed(model, body, caches, options)
    if draft_caches:
        feed(options["draft_model"], body, draft_caches, {**options, "kv_bits": None})
    seconds = time.perf_counter() - start
    whole = caches
    if not rest:
        whole = copy.deepcopy(caches)
        feed(model, tokens[-1:], whole, options)
    write(whole)
    return rest or tokens[-1:], Fed(len(body), seconds)
