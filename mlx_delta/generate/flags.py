"""The flags: mlx-lm's own, and those of the delta; what each may be."""

from __future__ import annotations

import argparse
import importlib
import math

from mlx_delta.loading import DEMO, MODEL_HELP
from mlx_delta.system.arguments import add_delta_arguments, delta_fields, flag_of_field
from mlx_delta.system.cli import HelpFormatter, Parser
from mlx_delta.system.memory import parse_bytes

# What each number must lie between, ends included. mlx-lm takes anything, and fails later, or
# silently does something else.
BOUNDS: dict[str, tuple[float, float]] = {
    "temp": (0, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (0, 1 << 31),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "min_tokens_to_keep": (1, 1 << 31),
    "seed": (0, (1 << 64) - 1),
    "max_kv_size": (5, 1 << 31),  # the first 4 tokens are always kept
    "prefill_step_size": (1, 1 << 31),
    "quantized_kv_start": (0, 1 << 31),
    "num_draft_tokens": (1, 1 << 31),
}
CHOICES = {"kv_bits": (2, 4, 8), "kv_group_size": (32, 64, 128)}  # what mlx-lm's caches can store


def build_parser() -> argparse.ArgumentParser:
    """mlx-lm's own flags, and those of the delta."""
    # ``import mlx_lm.generate`` would give the function of that name.
    parent = importlib.import_module("mlx_lm.generate").setup_arg_parser()
    parser = Parser(
        prog="python -m mlx_delta.generate",
        description="Generate text with hybrid delta attention.",
        parents=[parent],
        conflict_handler="resolve",
        add_help=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model",
        default=None,
        help=f"{MODEL_HELP} Default: {DEMO!r}.",
    )
    parser.add_argument(
        "--prompt", "-p", default=None, help="Message to the model ('-' reads from stdin)."
    )
    parser.add_argument("--prompt-file", help="A text file with the message to the model.")
    parser.add_argument(
        "--seed", type=int, help="Makes sampling repeatable; drawn anew each time by default."
    )
    parser.add_argument(
        "--save-prompt-cache",
        metavar="FILE",
        help="Write the caches of the prompt to a .safetensors file that --prompt-cache-file "
        "reads; the user's turn stays open, for the next prompt to go on with.",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="Keep what is read of prompts here, and go on from the longest prefix that is known: "
        "after a restart too, and shared between prompts that begin alike.",
    )
    parser.add_argument(
        "--cache-budget",
        metavar="BYTES",
        default="4GB",
        help="Bytes of --cache-dir at most; what was not used for longest goes.",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="BYTES",
        help="Memory that this process may take (6GB, 512MB): says before loading whether model "
        "and prompt fit and what would, and stops with a message rather than go beyond it.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead.")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="Generate a second time without the delta and show where the texts first differ.",
    )
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="In several processes (mlx.launch): let each have some of the layers, rather than "
        "some of every layer's heads.",
    )
    add_delta_arguments(parser)
    parser.set_defaults(only_read=False)  # of a command that caches a prompt, and answers nothing
    return parser


def given_wish(args: argparse.Namespace) -> str | None:
    """The flag that asks for a level by what it does, if one is given."""
    if args.delta_sparsity is not None:
        return "--delta-sparsity"
    return "--delta-kl" if args.delta_kl is not None else None


def flag(name: str) -> str:
    """An argument's name as it is written on the command line."""
    return "--" + name.replace("_", "-")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse values that no run can use, and flags that contradict each other.

    Raises:
        ValueError: One of these.
    """
    check_numbers(args)
    check_delta_flags(args)
    if args.no_delta and args.compare:
        raise ValueError("--compare needs the delta; drop --no-delta.")
    if args.compare and (args.prompt_cache_file or args.draft_model):
        raise ValueError("--compare works from the prompt alone; drop the cache or draft model.")
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; drop one.")
    if args.cache_dir is not None:
        for name in ("prompt_cache_file", "compare", "draft_model"):
            if getattr(args, name):
                raise ValueError(
                    f"--cache-dir does not go together with {flag(name)}: it works from the whole "
                    "prompt of one model; drop one."
                )
    parse_bytes(args.cache_budget)
    if args.memory_limit is not None:
        parse_bytes(args.memory_limit)
    if args.image:
        raise ValueError("--image is given, but the models here read text only.")
    if args.max_kv_size is not None and args.kv_bits is not None:
        raise ValueError(
            "--max-kv-size and --kv-bits do not go together: mlx-lm can't quantize a cache that "
            "drops tokens; drop one."
        )
    if args.prompt_cache_file is not None:
        for name in ("system_prompt", "max_kv_size"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{flag(name)} comes too late with --prompt-cache-file: the cache holds the "
                    "beginning of the conversation; give it where the cache is made."
                )
        if (wish := given_wish(args)) is not None:
            raise ValueError(
                f"{wish} comes too late with --prompt-cache-file: its keys are held already; give "
                "it where the cache is made."
            )
        if args.trust_remote_code and args.model is None:
            raise ValueError(
                "--trust-remote-code with --prompt-cache-file needs --model: a file must not "
                "choose whose code runs."
            )


def check_delta_flags(args: argparse.Namespace) -> None:
    """Refuse flags of the delta that contradict each other.

    Raises:
        ValueError: Two of them.
    """
    fields = delta_fields(args)
    delta_flags = [flag_of_field(args, name) for name in fields]
    delta_flags += ["--delta-paper"] if args.delta_paper else []
    wish = given_wish(args)
    delta_flags += [] if wish is None else [wish]
    if wish is not None and args.delta_paper:
        raise ValueError(f"--delta-paper and {wish} contradict each other; drop one.")
    for name in ("level", "threshold"):
        if wish is not None and name in fields:  # the parser knows of the flags only
            other = flag_of_field(args, name)
            raise ValueError(f"{wish} and {other} contradict each other; drop one.")
    if "threshold" in fields and fields.get("level") is not None:
        one, other = (flag_of_field(args, name) for name in ("level", "threshold"))
        raise ValueError(f"{one} and {other} contradict each other; drop one.")
    if args.delta_paper and args.kv is not None:
        raise ValueError(f"--delta-paper and --kv {args.kv} contradict each other; drop one.")
    if args.no_delta and delta_flags:
        raise ValueError(f"--no-delta and {delta_flags[0]} contradict each other; drop one.")


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers out of bounds by the name of their flag."""
    if args.max_tokens == 0 or args.max_tokens < -1:
        raise ValueError(f"--max-tokens must be positive (or -1) but got {args.max_tokens}.")
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is None or least <= value <= most:
            continue
        if most == 1 << 31 and not math.isnan(value) and value < least:
            raise ValueError(f"{flag(name)} must be >= {least} but got {value}.")
        raise ValueError(f"{flag(name)} must be from {least} to {most:.15g} but got {value}.")
    for name, choices in CHOICES.items():
        value = getattr(args, name)
        if value is not None and value not in choices:
            known = ", ".join(map(str, choices))
            raise ValueError(f"{flag(name)} must be one of {known} but got {value}.")
