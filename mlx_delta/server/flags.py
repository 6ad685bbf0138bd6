"""The flags: mlx-lm's own, those of the delta, and the limits."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
from pathlib import Path
from typing import Any

from mlx_delta.generate.flags import check_delta_flags
from mlx_delta.loading import DEMO, MODEL_HELP
from mlx_delta.system.arguments import add_delta_arguments
from mlx_delta.system.cli import HelpFormatter, Parser
from mlx_delta.system.memory import parse_bytes, show_bytes

from .served import MB, Served

CACHE_BUDGET = 4 * 10**9
KEY_VARIABLE = "MLX_DELTA_API_KEY"
# What each number must lie between, ends included.
BOUNDS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "num_draft_tokens": (1, 1 << 10),
    "temp": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (0, 1 << 31),
    "max_tokens": (1, 1 << 31),
    "decode_concurrency": (1, 1 << 10),
    "prompt_concurrency": (1, 1 << 10),
    "prefill_step_size": (1, 1 << 31),
    "prompt_cache_size": (0, 1 << 20),
    "quantized_kv_start": (0, 1 << 31),
    "max_body": (1, 1 << 40),
    "max_prompt_tokens": (1, 1 << 31),
    "max_answer_tokens": (1, 1 << 31),
    "max_queue": (0, 1 << 20),
    "max_connections": (1, 1 << 20),
    "client_timeout": (1, 3600),
    "grace": (0, 3600),
}


def build_parser() -> argparse.ArgumentParser:
    """mlx-lm's own flags, those of the delta, and the limits."""
    parser = Parser(
        prog="python -m mlx_delta.server",
        description="Serve a model over HTTP, as OpenAI's clients expect it.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=DEMO, help=MODEL_HELP)
    add("--adapter-path", help="LoRA adapters to apply, mlx-lm's or PEFT's.")
    add("--draft-model", help="A smaller model that guesses ahead; requests are then served singly")
    add("--num-draft-tokens", type=int, default=3, help="Tokens that it guesses at a time")
    add("--alias", metavar="NAME", help="A name for the model that requests may use as well.")
    add("--trust-remote-code", action="store_true", help="Let the model's files run code.")
    add(
        "--chat-template",
        help="A chat template (Jinja), or a file with one, instead of the model's.",
    )
    add(
        "--chat-template-args",
        type=_object,
        default={},
        metavar="JSON",
        help="Arguments of the chat template, such as '{\"enable_thinking\": false}'. Default: {}.",
    )
    _add_door(parser.add_argument_group("who may use it"))
    _add_limits(parser.add_argument_group("limits"))
    answers = parser.add_argument_group("answers, where a request does not say")
    answers.add_argument("--max-tokens", type=int, default=512, help="Tokens of an answer")
    answers.add_argument("--temp", type=float, default=0.0, help="Temperature; 0 is greedy")
    answers.add_argument("--top-p", type=float, default=1.0, help="Nucleus sampling")
    answers.add_argument("--top-k", type=int, default=0, help="Likeliest tokens; 0 is all")
    answers.add_argument("--min-p", type=float, default=0.0, help="Least share of the likeliest's")
    _add_work(parser.add_argument_group("work"))
    add_delta_arguments(parser)
    return parser


def _add_door(group: Any) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is all of the machine's")
    add("--port", type=int, default=8080, help="Port to listen on; 0 is any free one")
    add(
        "--api-key",
        metavar="KEY",
        help=f"What requests must bring; also read from {KEY_VARIABLE}, where other users of the "
        "machine do not see it. Default: none.",
    )
    add(
        "--allowed-origins",
        type=lambda text: [origin.strip() for origin in text.split(",") if origin.strip()],
        default=[],
        metavar="ORIGINS",
        help="Origins of web pages that may use the server, with commas; * is all. Default: none.",
    )


def _add_limits(group: Any) -> None:
    add = group.add_argument
    add(
        "--max-body",
        type=_size,
        default=Served.max_body,
        help=f"Size of a request, such as 500KB. Default: {Served.max_body // MB}MB.",
    )
    add("--max-prompt-tokens", type=int, help="Tokens of a prompt. Default: the model's context.")
    add(
        "--max-answer-tokens",
        type=int,
        help="The largest max_tokens that a request may ask for. Default: the model's context.",
    )
    add("--max-queue", type=int, default=Served.max_queue, help="Requests that may wait")
    add("--max-connections", type=int, default=Served.max_connections, help="Open connections")
    add(
        "--client-timeout",
        type=float,
        default=Served.seconds,
        metavar="SECONDS",
        help="How long a client may take to send its request, or to take a piece of its answer",
    )
    add(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="How long answers may go on after Ctrl-C or SIGTERM",
    )


def _add_work(group: Any) -> None:
    add = group.add_argument
    add("--decode-concurrency", type=int, default=32, help="Answers generated at one time")
    add("--prompt-concurrency", type=int, default=8, help="Prompts read at one time")
    add("--prefill-step-size", type=int, default=2048, help="Tokens of a prompt read in one step")
    add("--prompt-cache-size", type=int, default=10, help="Prompts whose caches are kept")
    add(
        "--prompt-cache-bytes",
        type=_size,
        metavar="SIZE",
        help="Bytes of them in memory, such as 2GB. Default: no bound but their number.",
    )
    add("--cache-dir", help="A directory in which they last from one start to the next.")
    add(
        "--cache-budget",
        type=_size,
        default=CACHE_BUDGET,
        metavar="SIZE",
        help=f"Bytes of them in that directory. Default: {show_bytes(CACHE_BUDGET)}.",
    )
    add(
        "--memory-limit",
        type=_size,
        metavar="SIZE",
        help="What model, caches and work may take together, such as 6GB. Default: what is free.",
    )
    add("--kv-bits", type=int, choices=(2, 4, 8), help="With --no-delta: mlx-lm's own quantization")
    add("--kv-group-size", type=int, default=64, choices=(32, 64, 128), help="Its group size")
    add("--quantized-kv-start", type=int, default=5000, help="Tokens after which it begins")
    add(
        "--log-level",
        default="INFO",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        help="What is told on the terminal",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse values that no run can use; read the key, and see whether others are let in.

    Raises:
        ValueError: One of these.
    """
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be from {least} to {most:.15g} but got {value}.")
    check_delta_flags(args)
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE) or None
    key = args.api_key
    if key is not None and (not key.strip() or not key.isprintable() or not key.isascii()):
        raise ValueError("--api-key must be of visible ASCII characters.")
    if args.chat_template and len(args.chat_template) < 1000 and Path(args.chat_template).is_file():
        args.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    args.is_local = _is_loopback(args.host)
    if args.prompt_concurrency > args.decode_concurrency:
        args.prompt_concurrency = args.decode_concurrency


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _size(text: str) -> int:
    """Bytes that a text such as 4GB means."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def _object(text: str) -> dict[str, Any]:
    """The JSON object of an argument."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
