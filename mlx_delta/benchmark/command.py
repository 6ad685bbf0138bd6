"""The command line: settings side by side, timed or as ceilings of chips."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.config import DeltaConfig
from mlx_delta.loading import DEMO, MODEL_HELP, load
from mlx_delta.measure.choice import choose_settings, with_samples
from mlx_delta.measure.provenance import machine_entry, model_entry
from mlx_delta.measure.roofline import CONTEXTS, SETTINGS, ceilings, roofline_values
from mlx_delta.measure.settings import PREFILL_STEP, Setting
from mlx_delta.measure.table import Table
from mlx_delta.measure.text import BUNDLED_TEXT, context_length, prompt_ids, read_text
from mlx_delta.ops.backend import has_kernels
from mlx_delta.system.arguments import add_delta_argument
from mlx_delta.system.blas import blas_status
from mlx_delta.system.chips import Chip, find_chips, this_chip
from mlx_delta.system.cli import HelpFormatter, Parser, run_command
from mlx_delta.system.devices import machine_name
from mlx_delta.system.tuning import Tuning, write_tuning

from .decode import DecodeBenchmark, decode_notes, decode_tables, decode_values
from .table import roofline_notes, roofline_tables, timing_notes, timing_tables, timing_values
from .timing import Benchmark
from .tune import (
    LENGTHS,
    NOTHING,
    said_of_default,
    seconds_of,
    tried_shapes,
    tune,
    tuning_notes,
    tuning_tables,
)


def build_parser() -> argparse.ArgumentParser:
    """The flags; those that mlx_lm.benchmark has too are named as there."""
    parser = Parser(
        prog="python -m mlx_delta.benchmark",
        formatter_class=HelpFormatter,
        description="Time ways to keep keys and values on one model, taking turns; or compute how "
        "fast chips could decode with them.",
    )
    add = parser.add_argument
    add("--model", default=DEMO, help=MODEL_HELP)
    add(
        "--settings",
        nargs="+",
        default=list(SETTINGS),
        metavar="SETTING",
        help="dense, stock (dense by MLX's own attention), delta, "
        "delta:level=0.1,key_bits=4, delta:tiles=0.95, paper, window-only, kv8, kv4, "
        f"rotating:1024. Default: {' '.join(SETTINGS)}.",
    )
    add_delta_argument(parser)
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        metavar="N",
        help="Tokens of prompt and answer together. Default: 512 to 32768, as the model allows.",
    )
    lengths.add_argument(
        "--prompt-tokens", "-p", type=int, metavar="N", help="One length, of the prompt alone."
    )
    add("--generation-tokens", "-g", type=int, default=64, help="Tokens to decode. Default: 64.")
    add("--num-trials", "-n", type=int, default=5, help="Rounds, after a warm-up. Default: 5.")
    add(
        "--decode",
        action="store_true",
        help="Time decode alone, against the first setting's: the prompt is read once, its keys "
        "and values copied into every setting's caches, which then take turns token by token.",
    )
    add("--prefill-step-size", type=int, default=PREFILL_STEP, help="Default: %(default)s.")
    add("--delay", type=float, default=0, help="Seconds of rest before each run. Default: 0.")
    add("--seed", type=int, default=0, help="Draws the order of settings in a round. Default: 0.")
    add("--text", type=Path, default=BUNDLED_TEXT, help="Prose, .txt or .xz. Default: bundled.")
    add("--output", type=Path, metavar="FILE.json", help="Write the results there as well.")
    add("--markdown", action="store_true", help="Print Markdown tables.")
    add("--trust-remote-code", action="store_true", help="Let the tokenizer run its own code.")
    add(
        "--tune",
        action="store_true",
        help="Instead of settings: time each way that this machine's GPU could attend from stored "
        "keys, for the model's shape, and keep the table in the user's folder for caches. "
        "Attention takes what was fastest from then on.",
    )
    roofline = parser.add_argument_group("ceilings, computed and not measured")
    roofline.add_argument(
        "--roofline",
        nargs="+",
        metavar="CHIP",
        help="Instead of timing: the decode ceiling of these chips, a family's (M4) or all, from "
        "the bytes that the settings store of the text. Contexts may be longer than the model's.",
    )
    roofline.add_argument(
        "--longest",
        type=int,
        metavar="N",
        help="Fill caches to so many tokens at most and extrapolate from there. Default: the "
        "longest context that the model allows.",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args), smaller="ask for shorter contexts")


def run(args: argparse.Namespace) -> None:
    """Check, load, measure or compute, print and write.

    Raises:
        ValueError: A flag or text that can't be used; the message names it.
        OSError: A file that can't be read or written.
    """
    chips = find_chips(args.roofline) if args.roofline else []
    if args.longest is not None and not chips:
        raise ValueError("--longest goes together with --roofline; drop it.")
    asked = [f"--{name}" for name in ("decode", "tune", "roofline") if getattr(args, name)]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]} are two things to do; drop one.")
    check_numbers(args)
    check_output(args.output)
    if args.tune and not has_kernels():
        print(NOTHING)
        return
    text = read_text(args.text)
    delta, settings = choose_settings(args.model, args.settings, args.delta)
    if delta is None:
        raise ValueError(
            f"model {args.model} is neither a Llama nor a BitNet, whose bytes and products are "
            "counted here; time it with mlx_lm.benchmark."
        )
    model, tokenizer = load(args.model, delta, trust_remote_code=args.trust_remote_code)
    settings = with_samples(settings, model, tokenizer)
    if status := blas_status():
        print(status, file=sys.stderr)
    data = header(args, delta)
    if chips:
        compute(args, chips, model, tokenizer, settings, text, data)
    elif args.decode:
        measure_decode(args, model, tokenizer, settings, text, data)
    elif args.tune:
        measure_paths(args, model, data)
    else:
        measure(args, model, tokenizer, settings, text, data)


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ValueError: One of these.
    """
    least = {"generation_tokens": 2, "num_trials": 1, "prefill_step_size": 1, "longest": 1}
    least |= {"prompt_tokens": 1, "delay": 0}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {bound} but got {value}.")
    for i, context in enumerate(args.contexts or []):
        if context < 1:
            raise ValueError(f"--contexts must be >= 1 but got {context}.")
        if context in args.contexts[:i]:
            raise ValueError(f"--contexts has {context} twice; drop one.")


def check_output(path: Path | None) -> None:
    """Refuse a file that can't be written, before anything is measured.

    Raises:
        OSError: Its folder is not there, or it or the folder can't be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"--output {path} is a folder; give a file's name.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {folder}.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"--output {path} can't be written; give another file.")


def header(args: argparse.Namespace, delta: DeltaConfig) -> dict[str, Any]:
    """What a results file says besides the results."""
    return {
        "model": model_entry(args.model),
        "delta": delta.to_dict(),
        "machine": {**machine_entry(), "chip": machine_name()},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": args.settings,
        "text": str(args.text),
        "seed": args.seed,
        "prefill_step_size": args.prefill_step_size,
    }


def choose_contexts(args: argparse.Namespace, model: nn.Module) -> list[int]:
    """The contexts that the flags ask for; by default all that the model allows."""
    if args.prompt_tokens is not None:
        return [args.prompt_tokens + args.generation_tokens]
    if args.contexts is not None:
        return sorted(args.contexts)
    limit = context_length(model)
    if args.roofline or limit is None:
        return list(CONTEXTS)
    return [context for context in CONTEXTS if context <= limit] or [limit]


def measure(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    settings: list[Setting],
    text: str,
    data: dict[str, Any],
) -> None:
    """Time the settings; after an interruption, print and write what there is."""
    contexts = choose_contexts(args, model)
    benchmark = Benchmark(
        model,
        settings,
        prompt_ids(tokenizer, text, max(contexts)),
        contexts,
        args.generation_tokens,
        args.num_trials,
        args.seed,
        args.prefill_step_size,
        args.delay,
    )
    chip = this_chip()
    complete = False
    try:
        benchmark.run(progress=True)
        complete = True
    finally:
        unpacks = not has_kernels()
        unpacks &= any(setting.delta and setting.delta.key_bits for setting in settings)
        data |= {"kind": "timing", "complete": complete, "notes": benchmark.notes}
        data["bandwidth_gb_per_s"] = chip.gb_per_s if chip else None
        data["results"] = timing_values(benchmark.rows, chip)
        if data["results"]:
            print(f"{args.model} on {machine_name()}\n")
            tables = timing_tables(benchmark.rows, chip)
            tiles = any(row.density is not None for row in benchmark.rows)
            show(args, tables, [*timing_notes(unpacks, tiles), *benchmark.notes])
        elif benchmark.notes:
            print("\n".join(benchmark.notes))
        if data["results"] or complete:  # else an older file is worth more
            write(args.output, data)


def measure_decode(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    settings: list[Setting],
    text: str,
    data: dict[str, Any],
) -> None:
    """Time decode alone; after an interruption, print and write what there is."""
    contexts = choose_contexts(args, model)
    timed = DecodeBenchmark(
        model,
        settings,
        prompt_ids(tokenizer, text, max(contexts)),
        contexts,
        args.generation_tokens,
        args.seed,
        args.prefill_step_size,
    )
    complete = False
    try:
        timed.run(progress=True)
        complete = True
    finally:
        if timed.rows:
            print(f"{args.model} on {machine_name()}\n")
            show(args, decode_tables(timed.rows), decode_notes(settings[0].name))
            results = decode_values(timed.rows)
            write(args.output, data | {"kind": "decode", "complete": complete, "results": results})


def measure_paths(args: argparse.Namespace, model: nn.Module, data: dict[str, Any]) -> None:
    """Measure the paths of decode attention and keep the table, as far as it got."""
    table, lengths = Tuning(), args.contexts or LENGTHS
    try:
        for found in tune(tried_shapes(model), lengths, seconds_of, progress=True):
            table = found
    finally:
        if table.seconds:
            show(args, tuning_tables(table), [*said_of_default(table), *tuning_notes()])
            print(f"Kept in {write_tuning(table)}")
            write(args.output, data | {"kind": "tuning"} | table.to_json())


def compute(
    args: argparse.Namespace,
    chips: list[Chip],
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    settings: list[Setting],
    text: str,
    data: dict[str, Any],
) -> None:
    """Print and write the ceilings of chips."""
    contexts = choose_contexts(args, model)
    limit = args.longest or context_length(model) or max(contexts)
    # Where a context goes beyond the model's, all of the model's is used to extrapolate from.
    longest = limit if max(contexts) > limit else max(contexts)
    found = ceilings(
        model,
        settings,
        prompt_ids(tokenizer, text, longest),
        contexts,
        longest,
        args.prefill_step_size,
        progress=True,
    )
    print(f"{args.model}: computed, not measured\n")
    show(args, roofline_tables(found, chips), roofline_notes(found, longest))
    write(args.output, data | {"kind": "roofline", "results": roofline_values(found, chips)})


def show(args: argparse.Namespace, tables: list[Table], notes: list[str]) -> None:
    """Print tables and what their columns mean."""
    print("\n\n".join(t.markdown() if args.markdown else t.text() for t in tables))
    print("\n" + "\n".join(f"- {note}" if args.markdown else note for note in notes))


def write(path: Path | None, data: dict[str, Any]) -> None:
    """Write results, if there is a file for them."""
    if path is not None:
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
