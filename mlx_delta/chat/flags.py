"""The flags: mlx-lm's of its chat, and those of the delta."""

from __future__ import annotations

import argparse
import importlib

from mlx_delta.generate.flags import check_delta_flags, check_numbers
from mlx_delta.loading import MODEL_HELP
from mlx_delta.system.arguments import add_delta_arguments
from mlx_delta.system.cli import HelpFormatter, Parser
from mlx_delta.system.memory import parse_bytes

from .options import Options


def build_parser() -> argparse.ArgumentParser:
    """mlx-lm's own flags, ours, and those of the delta."""
    options = Options()
    parser = Parser(
        prog="python -m mlx_delta.chat",
        description="Talk to a model in the terminal, or through a pipe.",
        parents=[importlib.import_module("mlx_lm.chat").setup_arg_parser()],
        conflict_handler="resolve",
        add_help=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model",
        default=None,
        help=f"{MODEL_HELP} Default: 'smollm2' if it was fetched before, else 'demo'.",
    )
    parser.add_argument("--min-p", type=float, default=options.min_p, help="Sampling min-p.")
    parser.add_argument("--top-k", type=int, default=options.top_k, help="Sampling top-k.")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=options.max_tokens,
        help="Tokens of an answer, at most.",
    )
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        default=options.prefill_step_size,
        help="Tokens of a message fed at a time; Ctrl-C stops between them.",
    )
    parser.add_argument(
        "--seed", type=int, help="Makes sampling repeatable; drawn anew each time by default."
    )
    parser.add_argument(
        "--draft-model", help="A model that guesses tokens ahead; shares the tokenizer."
    )
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        default=options.num_draft_tokens,
        help="Tokens that it guesses at a time.",
    )
    parser.add_argument(
        "--max-kv-size",
        type=int,
        help="Keep this many tokens; what is older is forgotten, but for the first.",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="BYTES",
        help="Memory that the chat may take (6GB, 512MB): a model or a message that does not fit "
        "is refused.",
    )
    parser.add_argument("--load", metavar="FILE", help="Go on with a conversation of /save.")
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="Let messages follow each other as plain text, as without a chat template.",
    )
    parser.add_argument(
        "--chat-template-config", help="Further arguments of the chat template, as a JSON object."
    )
    # Of mlx-lm's generate, whose code is shared: nothing that a chat asks for.
    parser.set_defaults(
        min_tokens_to_keep=1,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        extra_eos_token=(),
    )
    add_delta_arguments(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse values that no chat can use, and flags that contradict each other.

    Raises:
        ValueError: One of these.
    """
    check_numbers(args)
    check_delta_flags(args)
    if args.memory_limit is not None:
        parse_bytes(args.memory_limit)
    if args.max_kv_size is not None and args.draft_model is not None:
        raise ValueError(
            "--max-kv-size and --draft-model do not go together: a cache that drops tokens can't "
            "be rewound; drop one."
        )
    if args.pipeline:
        raise ValueError(
            "--pipeline needs several Macs, and a chat runs on one; python -m mlx_delta.generate "
            "runs on several."
        )
