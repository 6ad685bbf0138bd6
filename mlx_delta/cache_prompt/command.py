"""The command line: generate's own way through a prompt, without an answer."""

from __future__ import annotations

import argparse

from mlx_delta.generate.command import run
from mlx_delta.generate.flags import build_parser as generate_parser
from mlx_delta.loading import DEMO, MODEL_HELP
from mlx_delta.system.arguments import add_delta_arguments
from mlx_delta.system.cli import HelpFormatter, Parser, run_command


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``mlx_lm.cache_prompt``, and those that generate takes for a prompt."""
    parser = Parser(
        prog="python -m mlx_delta.cache_prompt",
        description="Read a prompt and keep its caches, for python -m mlx_delta.generate to go on "
        "with: in a file (--prompt-cache-file there), in a directory (--cache-dir), or both.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=DEMO, help=MODEL_HELP)
    add("--adapter-path", help="LoRA adapters to apply.")
    add("--trust-remote-code", action="store_true", help="Let the tokenizer run code of its own.")
    add("--prompt", "-p", help="Text to read ('-' reads from stdin).")
    add("--prompt-file", help="A text file to read.")
    add("--system-prompt", help="System message of the chat template.")
    add("--ignore-chat-template", action="store_true", help="Read the text as it is.")
    add("--chat-template-config", help="Options of the chat template, as JSON.")
    add("--prompt-cache-file", metavar="FILE", help="A .safetensors file to write.")
    add("--cache-dir", metavar="DIR", help="A directory of prefixes to keep the prompt in.")
    add("--cache-budget", metavar="BYTES", default="4GB", help="Bytes of --cache-dir at most.")
    add("--memory-limit", metavar="BYTES", help="Memory that this process may take.")
    add("--prefill-step-size", type=int, default=2048, help="Tokens of the prompt at a time.")
    add("--max-kv-size", type=int, help="Tokens that the caches keep at most.")
    add("--kv-bits", type=int, help="mlx-lm's quantized cache (with --no-delta).")
    add("--kv-group-size", type=int, default=64, help="Numbers that share a scale there.")
    add("--quantized-kv-start", type=int, default=5000, help="Tokens that stay unquantized there.")
    add("--eos-token", help=argparse.SUPPRESS)  # mlx-lm's; nothing is generated here
    add_delta_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    smaller = "use a shorter prompt, a smaller --prefill-step-size or a smaller model"
    return run_command(lambda: cache(args), smaller)


def cache(args: argparse.Namespace) -> None:
    """Read and keep the prompt.

    Raises:
        ValueError: A flag, file or prompt that can't be used; the message names it.
        OSError: A file that can't be read or written.
        MemoryError: Model or caches are larger than the memory.
    """
    if args.prompt_cache_file is None and args.cache_dir is None:
        raise ValueError("give --prompt-cache-file FILE or --cache-dir DIR: where to keep it.")
    if args.prompt is None and args.prompt_file is None:
        raise ValueError("give --prompt or --prompt-file: what to read.")
    whole = generate_parser().parse_args([])
    given = {**vars(args), "save_prompt_cache": args.prompt_cache_file, "prompt_cache_file": None}
    del given["eos_token"]
    vars(whole).update(given, only_read=True)
    run(whole)
