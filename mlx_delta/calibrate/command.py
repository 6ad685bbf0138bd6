"""The command line: calibrate a model and write the thresholds into its config.json."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlx_delta.config import MODES, RUN_MODES, DeltaConfig
from mlx_delta.loading import DEMO, MODEL_HELP, find_model, load, read_config
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.models import get_model_classes
from mlx_delta.models.common import read_delta
from mlx_delta.sensitivities import FILE_NAME, Sensitivities
from mlx_delta.system.arguments import add_delta_argument
from mlx_delta.system.cli import HelpFormatter, Parser, run_command
from mlx_delta.system.files import write_whole
from mlx_delta.system.kv import check_holds, written_fields

from . import KL_WINDOWS, WINDOWS, Calibration, calibrate, codes, runs, tiles
from .divergence import Comparison
from .family import Per
from .sensitivity import GRID
from .write import ENTRY, check_file, check_target, copy_model, merged, write_setting

PASSES = 3  # of tiles' few shares, by bisection
TABLE_ROWS = 22  # of the curve: as many as the grid has


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        prog="python -m mlx_delta.calibrate",
        formatter_class=HelpFormatter,
        description="Measure how much a model's output minds errors of its keys, choose how much "
        "to hold for a wanted sparsity or loss, and write both beside the model. With --mode "
        "relative or absolute: choose thresholds instead, whose cost --cost says how to measure.",
    )
    add = parser.add_argument
    add("--model", default=DEMO, help=MODEL_HELP)
    add("--text", type=Path, default=BUNDLED_TEXT, help="Prose, .txt or .xz. Default: bundled.")
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument(
        "--sparsity",
        type=float,
        help="Wanted share of the keys' deltas outside the window that are zero; for thresholds, "
        "of QK^T that a prompt of --length skips.",
    )
    add("--kl", type=float, help="Or: KL divergence from dense attention, in nats per token.")
    wish.add_argument(
        "--loss",
        type=float,
        help="Or, for thresholds: how much the loss may rise, in nats per token.",
    )
    wish.add_argument(
        "--tiles",
        type=float,
        nargs="?",
        const=tiles.DEFAULT_KL,
        metavar="KL",
        help="Or: how much of a long prompt's attention each layer computes, so that all together "
        f"lose so much against exact prefill. Default: {tiles.DEFAULT_KL}. Takes about "
        f"{PASSES} passes over the text for each layer; the rest of the setting stays.",
    )
    wish.add_argument(
        "--codes",
        action="store_true",
        help="Or: of a calibrated model, measure anew only what decides how many bits codes get "
        "(key_format=codes, value_format=rotated); the rest of the setting stays. One pass forward "
        "and back. With --bytes or --kl also choose these bits, of keys and of values, and whether "
        "keys are held (key_format=deltas), by what they do to another window.",
    )
    add(
        "--bytes",
        type=float,
        metavar="SHARE",
        help="With --codes: what far keys and values may take, of what they take in 16 bits. 0.2: "
        "a fifth.",
    )
    add(
        "--length",
        type=int,
        help=f"Tokens of a window. Default: {runs.LENGTH:,}, for thresholds 2,048, for tiles "
        f"{tiles.LENGTH:,}, or the model's context.",
    )
    add(
        "--weights",
        choices=("gradients", "queries"),
        help="What sensitivities are made from: gradients of the model's output (default), or, "
        "for models that pass none on, the queries. Ternary models: queries.",
    )
    add(
        "--prose-only",
        action="store_true",
        help="Leave out what a model needs where it has to recall what it was told.",
    )
    add(
        "--uncorrected",
        action="store_true",
        help="Leave out the pass for each layer that corrects its sensitivities.",
    )
    add(
        "--windows",
        type=int,
        help=f"For thresholds: at most so many windows of the text. Default: {WINDOWS}, of which "
        f"{KL_WINDOWS} serve for --cost kl.",
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
        choices=MODES,
        default="optimal",
        help="optimal (default) or greedy runs; or thresholds, relative to each block's spread of "
        "keys or in the keys' own units (absolute), as in the paper.",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="Of what is sampled: labels for gradients, queries for --cost attention. Default: 0.",
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
    parser = build_parser()
    args = parser.parse_args(argv)
    if (wrong := wrong_wish(args)) is not None:
        parser.error(wrong)
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
    check_flags(args)
    own = read_delta(entries.get(ENTRY)) or DeltaConfig()
    base = own.changed(**written_fields(args.delta or ""))
    if args.tiles is None and not args.codes:
        wishes = ("sparsity", "kl", "loss")
        wish = next(name for name in wishes if getattr(args, name) is not None)
        check_holds(base, f"--{wish}")
    if args.output is not None and args.dry_run:
        raise ValueError("--output and --dry-run contradict each other; drop one.")
    if not args.dry_run:
        check_target(args.model, path, args.output)
    if args.curve is not None:
        check_file(args.curve)
    text = read_text(args.text)
    # Without a level or thresholds of its own: those of the file may be what is to be mended.
    if args.tiles is not None or args.codes:
        pass  # all but the shares stays, or all but what codes need
    elif args.mode in RUN_MODES:
        base = base.changed(threshold_mode=args.mode, level=None, sensitivities=None)
    else:
        base = base.changed(threshold_mode=args.mode, threshold=1.0)
    model, tokenizer = load(path, base, trust_remote_code=args.trust_remote_code)
    if args.codes:
        lines, config, curve = _codes(args, model, tokenizer, text)
    elif args.tiles is not None:
        lines, config, curve = _tiles(args, model, tokenizer, text)
    elif base.cuts_runs:
        lines, config, curve = _sensitivities(args, model, tokenizer, text)
    else:
        lines, config, curve = _thresholds(args, model, tokenizer, text)
    print("\n".join(lines))
    shown = config
    if isinstance(config.sensitivities, Sensitivities):
        shown = config.changed(sensitivities=FILE_NAME)
    print(f'\n"{ENTRY}": {json.dumps(merged(entries.get(ENTRY), shown))}')
    if args.curve is not None:
        curve = {"model": str(args.model), "text": str(args.text), **curve}
        write_whole(args.curve, f"{json.dumps(curve, indent=1)}\n".encode())
        print(f"Curves written to {args.curve}.")
    if args.dry_run:
        print("Dry run: no setting written.")
    elif args.output is not None:
        copy_model(path, args.output, config)
        print(f"Calibrated copy of the model written to {args.output}.")
    else:
        write_setting(path / "config.json", config)
        print(f"Written to {path / 'config.json'}.")


def wrong_wish(args: argparse.Namespace) -> str | None:
    """What is wrong with what is asked for; ``None`` if nothing is."""
    wishes = {"--sparsity": args.sparsity, "--loss": args.loss, "--tiles": args.tiles}
    wishes |= {"--codes": args.codes or None, "--kl": args.kl}
    given = [flag for flag, value in wishes.items() if value is not None]
    if len(given) != 1 and given != ["--codes", "--kl"]:
        known = "--sparsity, --kl, --loss, --tiles or --codes"
        return f"give one of {known} but got {' and '.join(given) or 'none'}"
    if args.bytes is not None and given != ["--codes"]:
        return "--bytes goes with --codes, and without --kl"
    return None


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that the mode has no use for.

    Raises:
        ValueError: There is one.
    """
    run_flags = {"--kl": args.kl, "--weights": args.weights, "--uncorrected": args.uncorrected}
    run_flags["--prose-only"] = args.prose_only
    threshold_flags = {"--loss": args.loss, "--cost": args.cost, "--windows": args.windows}
    threshold_flags["--per-head or --uniform"] = None if args.per == "layer" else args.per
    cuts_runs = args.mode in RUN_MODES
    for own, name in ((args.tiles is not None, "tiles"), (args.codes, "codes")):
        for flag, value in (run_flags | threshold_flags).items() if own else ():
            if value not in (None, False) and (name, flag) != ("codes", "--kl"):
                raise ValueError(f"{flag} says nothing about {name}; drop it or --{name}.")
        if own:
            return
    for flag, value in (threshold_flags if cuts_runs else run_flags).items():
        if value not in (None, False):
            other = "relative or absolute" if cuts_runs else "optimal or greedy"
            raise ValueError(f"{flag} is for --mode {other}; drop it, or give that mode.")


def _thresholds(
    args: argparse.Namespace, model: Any, tokenizer: Any, text: str
) -> tuple[list[str], DeltaConfig, dict[str, Any]]:
    """What to print, the setting, and what to write as curves."""
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
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    return report(found), found.config, found.to_dict()


def _tiles(
    args: argparse.Namespace, model: Any, tokenizer: Any, text: str
) -> tuple[list[str], DeltaConfig, dict[str, Any]]:
    """The same for the share of tiles of each layer."""
    found = tiles.calibrate_tiles(
        model,
        tokenizer,
        text,
        kl=args.tiles,
        length=args.length,
        progress=sys.stderr.isatty(),
    )
    assert isinstance(found.config.tiles, tuple)
    lines = [f"Shares of tiles for a prompt of {found.length} tokens: the layer, its share, its KL"]
    for layer, share in enumerate(found.config.tiles):
        measured = found.curves.get(layer, {}).get(share)
        cell = "     –" if measured is None else f"{measured:.6f}"
        lines.append(f"{layer:5d}  {share:5.2f}  {cell}")
    chosen = found.chosen
    lines.append(
        f"All together: {chosen.density or 1:.3f} of the tiles computed, KL "
        f"{chosen.divergence:.5f} (wanted: at most {found.kl:g}), top-1 {chosen.top1:.3f}"
    )
    return lines, found.config, found.to_dict()


def _codes(
    args: argparse.Namespace, model: Any, tokenizer: Any, text: str
) -> tuple[list[str], DeltaConfig, dict[str, Any]]:
    """The same for the bits of codes."""
    found = codes.calibrate_codes(
        model,
        tokenizer,
        text,
        share=args.bytes,
        kl=args.kl,
        length=args.length,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    return codes.report(found), found.config, found.to_dict()


def _sensitivities(
    args: argparse.Namespace, model: Any, tokenizer: Any, text: str
) -> tuple[list[str], DeltaConfig, dict[str, Any]]:
    """The same for runs that are cut by what their errors cost."""
    found = runs.calibrate_text(
        model,
        tokenizer,
        text,
        sparsity=args.sparsity,
        kl=args.kl,
        way=args.weights,
        corrected=not args.uncorrected,
        recalled=not args.prose_only,
        length=args.length,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    lines = [
        f"Levels of {found.config.threshold_mode} runs, the second half of {found.length} tokens:",
        "    level   zeros       KL   top-1",
    ]
    for level, result in found.curve:
        lines.append(_row(level, result))
    lines += ["Chosen:", _row(found.config.run_level, found.chosen)]
    return lines, found.config, found.to_dict()


def _row(level: float, found: Comparison) -> str:
    return f"{level:9.4g}  {found.zeros:6.3f}  {found.divergence:.5f}  {found.top1:6.3f}"


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
