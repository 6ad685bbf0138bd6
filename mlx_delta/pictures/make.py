"""From the command line's arguments to pictures: reading files, or running a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_delta.config import DeltaConfig
from mlx_delta.loading import DEMO, load
from mlx_delta.measure.choice import choose_settings, with_samples
from mlx_delta.measure.prefill_file import read_rows
from mlx_delta.measure.roofline import CONTEXTS, SETTINGS, ceilings, roofline_values
from mlx_delta.measure.settings import PREFILL_STEP, Setting
from mlx_delta.measure.sparsity import measure_sparsity
from mlx_delta.measure.text import (
    BUNDLED_TEXT,
    context_length,
    encode_piece,
    encode_text,
    prompt_ids,
    read_text,
)
from mlx_delta.models.common import model_setting
from mlx_delta.system.chips import find_chips

from . import names
from .heads import HeadMap, draw_heads
from .keys import draw_keys
from .needles import draw_needles, make_grid
from .prefill import draw_prefill
from .record import record_head
from .results import choose, read_runs
from .roofline import Roofline, draw_roofline, read_roofline
from .theme import Draw
from .tradeoff import draw_tradeoff

CHIPS = ("M4", "M4 Pro", "M4 Max")


def tradeoff(args: argparse.Namespace) -> Draw:
    """Scores against sparsity and bytes, from results files."""
    runs = choose(read_runs(args.results), "task", args.tasks)
    runs = choose(runs, "setting", args.settings)
    return lambda theme: draw_tradeoff(runs, theme, args.sparsity, args.against)


def needles(args: argparse.Namespace) -> Draw:
    """Needles by length and depth, from a results file."""
    runs = choose(read_runs([args.results]), "task", ["needles"])
    runs = choose(runs, "setting", args.settings)
    grids = [make_grid(run.setting, run.metrics) for run in runs]
    title = f"{runs[0].model}: needles by length and depth"
    source = f"mlx_delta.evaluate, {runs[0].date}."
    return lambda theme: draw_needles(grids, theme, title, source)


def heads(args: argparse.Namespace) -> Draw:
    """Sparsity per head, from a results file or from a model and a text."""
    _one_source(args)
    if args.results is None:
        return _heads_of_model(args)
    runs = read_runs([args.results])
    runs = choose(runs, "task", [args.task or runs[0].task])
    runs = choose(runs, "setting", args.settings)
    chosen = [run for run in runs if run.heads is not None and run.kind in ("delta", "paper")]
    if not chosen:
        raise ValueError(
            f"{args.results} has no setting with held keys among "
            f"{', '.join(run.setting for run in runs)}; evaluate one, such as delta."
        )
    maps = [
        HeadMap(_full_name(run.setting, run.delta), run.heads)
        for run in chosen
        if run.heads is not None
    ]
    title = f"{chosen[0].model}: prefill sparsity of each layer and kv head"
    about = (
        f"Share of QKᵀ multiply-accumulates skipped; mean of {chosen[0].samples:,} samples of "
        f"{chosen[0].task}."
    )
    source = f"mlx_delta.evaluate, {chosen[0].date}."
    return lambda theme: draw_heads(maps, theme, title, about, source)


def _heads_of_model(args: argparse.Namespace) -> Draw:
    model, tokenizer, settings = _load(args, args.settings or ["delta"])
    for setting in settings:
        if setting.kind not in ("delta", "paper"):
            raise ValueError(f"{setting.name!r} holds no keys; give delta or paper settings.")
    tokens, source = _tokens(args, model, tokenizer)
    maps = []
    for setting in tqdm(settings, unit="setting", disable=None):
        caches = setting.make_caches(model, len(tokens))
        setting.prefill(model, tokens, caches)
        assert setting.delta is not None
        name = _full_name(setting.name, setting.delta.to_dict())
        maps.append(HeadMap(name, measure_sparsity(caches, len(tokens)).prefill_heads))
    title = f"{args.model or DEMO}: prefill sparsity of each layer and kv head"
    about = f"Share of QKᵀ multiply-accumulates skipped, {source}."
    source = f"mlx_delta.pictures heads, {args.today}."
    return lambda theme: draw_heads(maps, theme, title, about, source)


def _full_name(setting: str, delta: names.Delta) -> str:
    """A setting's name, and its threshold where the name does not tell."""
    told = "threshold" in names.written_options(setting)
    return setting if told else f"{setting} ({names.label(setting, delta)})"


def keys(args: argparse.Namespace) -> Draw:
    """A head's delta key matrix and attention, from a model and a text."""
    model, tokenizer, (setting,) = _load(args, [args.setting])
    tokens, source = _tokens(args, model, tokenizer)
    if args.ask:
        tokens += encode_piece(tokenizer, args.ask)
        source += f" and “{args.ask.strip()}”"
    span = None if args.range is None else (args.range[0], args.range[1])
    if span is not None and not 0 <= span[0] < span[1] <= len(tokens):
        raise ValueError(
            f"--range must be two of 0 to {len(tokens)}, the first one smaller, but got "
            f"{span[0]} {span[1]}."
        )
    record = record_head(model, tokens, setting, args.layer, args.head)
    texts = [tokenizer.decode([token]) for token in tokens]
    name, source = args.model or DEMO, f"{source}, {args.today}"
    return lambda theme: draw_keys(record, theme, name, texts, source, span)


def roofline(args: argparse.Namespace) -> Draw:
    """Decode ceilings, from a file or from a model."""
    _one_source(args)
    if args.results is not None:
        found = read_roofline(args.results)
    else:
        found = _roofline_of_model(args)
    return lambda theme: draw_roofline(found, theme)


def _roofline_of_model(args: argparse.Namespace) -> Roofline:
    chips = find_chips(args.chips or CHIPS)
    if args.chips is None:
        chips = [chip for chip in chips if chip.name in CHIPS]
    contexts = sorted(set(args.contexts or CONTEXTS))
    if contexts[0] < 1:
        raise ValueError(f"--contexts must be >= 1 but got {contexts[0]}.")
    model, tokenizer, settings = _load(args, args.settings or list(SETTINGS))
    longest = min(contexts[-1], context_length(model) or contexts[-1])
    ids = prompt_ids(tokenizer, read_text(args.text or BUNDLED_TEXT), longest)
    rows = ceilings(model, settings, ids, contexts, longest, PREFILL_STEP, progress=True)
    values = roofline_values(rows, chips)
    setting = model_setting(model)
    assert setting is not None
    return Roofline(args.model or DEMO, setting.to_dict(), args.today, values)


def prefill(args: argparse.Namespace) -> Draw:
    """Prefill by tiles, from a file."""
    rows = read_rows(args.results)
    return lambda theme: draw_prefill(rows, theme)


def _one_source(args: argparse.Namespace) -> None:
    """Refuse a file and a model together.

    Raises:
        ValueError: Both are given.
    """
    flags = [name for name in ("model", "text", "delta") if getattr(args, name) is not None]
    if args.results is not None and flags:
        raise ValueError(f"{args.results} and --{flags[0]} are both given; drop one.")


def _load(args: argparse.Namespace, wanted: list[str]) -> tuple[Any, Any, list[Setting]]:
    """The model, its tokenizer, and settings on it."""
    name = args.model or DEMO
    delta, settings = choose_settings(name, wanted, args.delta)
    if delta is None:
        raise ValueError(f"model {name} holds no keys: it is neither a Llama nor a BitNet.")
    assert isinstance(delta, DeltaConfig)
    model, tokenizer = load(name, delta)
    return model, tokenizer, with_samples(settings, model, tokenizer)


def _tokens(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[list[int], str]:
    """The first tokens of the text, and what they are in words.

    Raises:
        ValueError: The text or the model's context is shorter.
    """
    path: Path = args.text or BUNDLED_TEXT
    if args.tokens < 1:
        raise ValueError(f"--tokens must be >= 1 but got {args.tokens}.")
    limit = context_length(model)
    if limit is not None and args.tokens > limit:
        raise ValueError(
            f"--tokens must be <= {limit}, the model's context, but got {args.tokens}."
        )
    tokens = encode_text(tokenizer, read_text(path))
    if len(tokens) < args.tokens:
        raise ValueError(f"{path} has {len(tokens)} tokens; give --tokens {len(tokens)} or less.")
    return tokens[: args.tokens], f"the first {args.tokens:,} tokens of {path.name}"
