"""The command line: calibrate a model and write the thresholds into its config.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.loading import DEMO, find_model, load, read_config
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.models import get_model_classes
from mlx_delta.models.common import read_delta
from mlx_delta.system.arguments import add_delta_argument
from mlx_delta.system.cli import HelpFormatter, run_command

from . import KL_WINDOWS, WINDOWS, Calibration, calibrate
from .family import Per
from .sensitivity import GRID
from .write import ENTRY, check_file, check_target, copy_model, merged, write_setting, write_text

TABLE_ROWS = 22  # of the curve: as many as the grid has


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_delta.calibrate",
        formatter_class=HelpFormatter,
        description="Choose thresholds for a wanted sparsity or loss, and write them into a "
        "model's config.json. The sparsity of all thresholds takes one pass of the model over each "
        "window; what they cost, see --cost.",
    )
    add = parser.add_argument
    add("--model", default=DEMO, help="A directory, a Hugging Face repository, or a bundled model.")
    add("--text", type=Path, default=BUNDLED_TEXT, help="Prose, .txt or .xz. Default: bundled.")
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument(
        "--sparsity", type=float, help="Wanted share of QK^T that a prompt of --length skips."
    )
    wish.add_argument(
        "--loss", type=float, help="Or: how much the loss may rise, in nats per token."
    )
    add("--length", type=int, help="Tokens of a window. Default: 2,048, or the model's context.")
    add(
        "--windows",
        type=int,
        help=f"At most so many windows of the text. Default: {WINDOWS}, of which {KL_WINDOWS} "
        "serve for --cost kl.",
    )
    per = parser.add_mutually_exclusive_group()
    for name, what in (
        ("layer", "One threshold for each layer (default)."),
        ("head", "One threshold for each kv head."),
    ):
        per.add_argument(f"--per-{name}", dest="per", action="store_const", const=name, help=what)
    per.add_argument(
        "--uniform", dest="per", action="store_const", const="model", help="One for all layers."
    )
    add(
        "--cost",
        choices=("kl", "attention"),
        help="By what skipping is shared out among layers. kl (default): the measured KL "
        "divergence from dense attention with one layer held at a time. Takes layers x "
        f"{len(GRID)} thresholds x windows passes of the model over a window "
        f"({28 * len(GRID) * KL_WINDOWS} for 28 layers and {KL_WINDOWS} windows), with --per-head "
        "times the kv heads. attention: the error of each layer's own attention. Takes no pass "
        "more, but does not know what later layers make of it.",
    )
    add(
        "--mode",
        choices=("relative", "absolute"),
        help="Thresholds relative to each block's spread of keys, or in the keys' own units, as in "
        "the paper. Default: the model's setting.",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="Of the queries that --cost attention samples. Default: 0.",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="Write a calibrated copy of the model there, and leave the model as it is.",
    )
    add_delta_argument(parser)
    add("--dry-run", action="store_true", help="Only report; write no setting.")
    add("--curve", type=Path, metavar="FILE.json", help="Write the curves there.")
    add("--trust-remote-code", action="store_true", help="Let the tokenizer run its own code.")
    parser.set_defaults(per="layer")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(
        lambda: run(args),
        smaller="use a smaller --length or a smaller model",
        interrupted="Interrupted; the model is as it was.",
    )


def run(args: argparse.Namespace) -> None:
    """Load, calibrate, write, print.

    Raises:
        ValueError: A flag, a file or a wish that can't be used; the message names it.
        OSError: A file that can't be read or written.
    """
    path = find_model(args.model)
    entries = read_config(path)
    get_model_classes(entries)  # refuses a model without keys to hold
    base = DeltaConfig.parse(args.delta or "", read_delta(entries.get(ENTRY)))
    if args.output is not None and args.dry_run:
        raise ValueError("--output and --dry-run contradict each other; drop one.")
    if not args.dry_run:
        check_target(args.model, path, args.output)
    if args.curve is not None:
        check_file(args.curve)
    text = read_text(args.text)
    # Without thresholds of its own: those of the file may be what is to be mended.
    base = dataclasses.replace(base, threshold=1.0)
    model, tokenizer = load(path, base, trust_remote_code=args.trust_remote_code)
    per: Per = args.per
    found = calibrate(
        model,
        tokenizer,
        text,
        sparsity=args.sparsity,
        loss=args.loss,
        length=args.length,
        windows=args.windows,
        per=per,
        cost=args.cost,
        mode=args.mode,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    print("\n".join(report(found)))
    entry = merged(entries.get(ENTRY), found.config)
    print(f'\n"{ENTRY}": {json.dumps(entry)}')
    if args.curve is not None:
        curve = {"model": str(args.model), "text": str(args.text), **found.to_dict()}
        write_text(args.curve, json.dumps(curve, indent=1) + "\n")
        print(f"Curves written to {args.curve}.")
    if args.dry_run:
        print("Dry run: no setting written.")
    elif args.output is not None:
        copy_model(path, args.output, found.config)
        print(f"Calibrated copy of the model written to {args.output}.")
    else:
        write_setting(path / "config.json", found.config)
        print(f"Written to {path / 'config.json'}.")


def report(found: Calibration) -> list[str]:
    """The curve as a table, and what was chosen."""
    mode = found.config.threshold_mode
    layers = found.recording.sparsity.mean(axis=1)  # [layers, G]
    curve = found.curve
    rows = np.unique(np.linspace(0, len(curve.thresholds) - 1, TABLE_ROWS).astype(int))
    lines = [
        f"One threshold for all layers ({mode}), {found.windows} windows of {found.length} tokens:",
        "threshold  sparsity  least layer  most layer",
    ]
    for threshold, mean in zip(curve.thresholds[rows], curve.sparsity[rows], strict=True):
        each = [
            np.interp(threshold, grid, sparsity)
            for grid, sparsity in zip(found.recording.thresholds, layers, strict=True)
        ]
        lines.append(f"{threshold:9.4g}  {mean:8.4f}  {min(each):11.4f}  {max(each):10.4f}")
    lines += [
        "",
        f"Chosen: a prefill sparsity of {found.sparsity:.4f} (at most {found.highest:.4f} with "
        "these blocks and window)",
    ]
    if found.divergence is not None:
        lines.append(
            f"Expected KL divergence from dense: {found.divergence.chosen:.5f} nats per token; "
            f"with one threshold for all layers {found.divergence.uniform:.5f}"
        )
    if found.loss is not None:
        lines.append(
            f"Loss of held-back windows: {found.loss.dense:.4f} nats per token dense, "
            f"{found.loss.delta:.4f} with the delta ({found.loss.rise:+.4f})"
        )
    return lines
