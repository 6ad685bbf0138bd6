"""The command line: one command for each kind of picture."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
from pathlib import Path

from mlx_delta.loading import DEMO
from mlx_delta.system.arguments import add_delta_argument
from mlx_delta.system.cli import HelpFormatter, Parser, run_command
from mlx_delta.wording import nearest

EXTRA = "pip install 'mlx_delta[pictures]'"
KINDS = ("tradeoff", "needles", "heads", "keys", "roofline", "prefill")


def build_parser() -> argparse.ArgumentParser:
    """A command for each kind, and the flags that all have."""
    parser = Parser(
        prog="python -m mlx_delta.pictures",
        formatter_class=HelpFormatter,
        description="Pictures of what the delta keeps and costs, as PNG and SVG, for light and "
        "dark pages.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    def kind(name: str, text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        sub.add_argument(
            "-o",
            "--output",
            required=True,
            metavar="PATH",
            help="Where to: PATH-light.png, PATH-light.svg and so on; with a suffix, that format.",
        )
        sub.add_argument(
            "--theme", choices=("light", "dark", "both"), default="both", help="Default: both."
        )
        return sub

    tradeoff = kind("tradeoff", "Scores against sparsity and cache bytes.")
    tradeoff.add_argument(
        "results", nargs="+", metavar="FILE.json", help="Written by mlx_delta.evaluate."
    )
    tradeoff.add_argument("--tasks", nargs="+", metavar="TASK", help="Default: all in the files.")
    tradeoff.add_argument("--settings", nargs="+", metavar="SETTING", help="Default: all.")
    tradeoff.add_argument(
        "--sparsity",
        choices=("prefill", "decode", "overall"),
        default="prefill",
        help="Default: prefill.",
    )
    tradeoff.add_argument(
        "--against", choices=("sparsity", "bytes", "both"), default="both", help="Default: both."
    )

    needles = kind("needles", "Needles found by length and depth.")
    needles.add_argument("results", metavar="FILE.json", help="Written by mlx_delta.evaluate.")
    needles.add_argument("--settings", nargs="+", metavar="SETTING", help="Default: all.")

    heads = kind("heads", "Sparsity of each layer and kv head.")
    heads.add_argument(
        "results", nargs="?", metavar="FILE.json", help="Written by mlx_delta.evaluate; or --model."
    )
    heads.add_argument("--task", help="Of the file. Default: its first.")
    _add_model(heads)
    heads.add_argument(
        "--settings", nargs="+", metavar="SETTING", help="Default: all that hold keys; or delta."
    )
    heads.add_argument("--tokens", type=int, default=2048, help="Of the text. Default: 2048.")

    keys = kind("keys", "A kv head's delta key matrix, and its attention map.")
    _add_model(keys)
    keys.add_argument("--setting", default="delta", help="Default: delta, the model's own.")
    keys.add_argument("--layer", type=int, default=1, help="Counted from 0. Default: 1.")
    keys.add_argument("--head", type=int, default=0, help="Kv head, from 0. Default: 0.")
    keys.add_argument("--tokens", type=int, default=512, help="Of the text. Default: 512.")
    keys.add_argument("--ask", metavar="TEXT", help="Put this after those tokens.")
    keys.add_argument(
        "--range",
        type=int,
        nargs=2,
        metavar=("FIRST", "END"),
        help="Show these keys only; of up to 80 the tokens are written under the axis.",
    )

    roofline = kind("roofline", "Decode ceilings of chips against context; computed, not measured.")
    roofline.add_argument(
        "results",
        nargs="?",
        metavar="FILE.json",
        help="Written by mlx_delta.benchmark --roofline; or --model.",
    )
    _add_model(roofline)
    roofline.add_argument("--settings", nargs="+", metavar="SETTING", help="As for the benchmark.")
    roofline.add_argument(
        "--chips", nargs="+", metavar="CHIP", help="Default: M4 'M4 Pro' 'M4 Max'."
    )
    roofline.add_argument("--contexts", type=int, nargs="+", metavar="N", help="In tokens.")

    prefill = kind("prefill", "Prefill by tiles: speed, density and loss against length.")
    prefill.add_argument(
        "results", metavar="FILE.jsonl", help="Written by examples/prefill_results.py."
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"A directory, a hub name or a bundled model ({DEMO}).")
    parser.add_argument("--text", type=Path, metavar="FILE", help="Prose. Default: bundled.")
    add_delta_argument(parser)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-") and argv[0] not in KINDS:
        print(
            f"error: unknown kind of picture {argv[0]!r}{nearest(argv[0], KINDS)}; known are "
            f"{', '.join(KINDS)}.",
            file=sys.stderr,
        )
        return 1
    args = build_parser().parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"error: pictures need matplotlib, which is not installed: {EXTRA}", file=sys.stderr)
        return 1
    return run_command(lambda: run(args), smaller="use fewer --tokens or --settings")


def run(args: argparse.Namespace) -> None:
    """Draw the picture, write it, and print the files' names.

    Raises:
        ValueError: A flag or file that can't be used; the message names it.
        OSError: A file that can't be read or written.
    """
    from . import make, theme

    theme.check_writable(args.output)
    themes = [t for t in (theme.LIGHT, theme.DARK) if args.theme in (t.name, "both")]
    args.today = datetime.date.today().isoformat()
    draw = getattr(make, args.kind)(args)
    for file in theme.save(draw, args.output, themes):
        print(file)
