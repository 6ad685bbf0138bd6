"""Convert a checkpoint for Macs, iPads and iPhones: ``python -m mlx_delta.convert SOURCE -o DIR``.

``python -m mlx_delta.convert check DIR`` checks a directory against mlx-swift-lm's rules.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mlx_delta.system.cli import HelpFormatter, plain_output

from .errors import ConvertError
from .files import parse_json
from .targets import TARGETS, parse_memory

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def make_parser() -> argparse.ArgumentParser:
    """The command line of a conversion."""
    presets = "; ".join(
        f"{name}: {t.bits}-bit, head and embedding {t.embed_bits}-bit, {t.context} tokens"
        for name, t in TARGETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m mlx_delta.convert",
        formatter_class=HelpFormatter,
        description="Convert Llama and BitNet checkpoints (Hugging Face safetensors, GGUF, "
        "mlx-lm) for MLX on Macs, iPads and iPhones.",
        epilog=f"Presets of --target: {presets}. Also: python -m mlx_delta.convert check DIR.",
    )
    add = parser.add_argument
    add("source", help="directory, .gguf file or hub name (owner/name)")
    add("-o", "--output", help="directory to make (default: the source's name and the target)")
    add("--target", choices=list(TARGETS), default="mac", help="kind of device (default mac)")
    add("--q-bits", type=int, help="bits of the layers' weights: 2, 3, 4, 5, 6, 8; 16 for none")
    add("--q-group-size", type=int, help="weights that share a scale: 32, 64 or 128")
    add("--embed-bits", type=int, help="bits of embedding and head; 16 for none")
    add("--dtype", choices=list(DTYPES), help="of what is not quantized, and of scales")
    add(
        "--ternary",
        choices=["auto", "affine", "packed"],
        default="auto",
        help="layout of ternary layers (default: packed for bitnet, affine for llama)",
    )
    add(
        "--float-activations",
        dest="int8_activations",
        action="store_false",
        help="ternary models: do not let mlx_delta round activations to int8, as they were trained",
    )
    add("--max-context", type=int, help="tokens to plan memory for")
    add("--kv-bits", type=int, choices=[4, 8, 16], help="of the key-value cache, for the same")
    add("--device-memory", help="the device's memory, such as 8GB")
    add(
        "--delta",
        help="setting of hybrid delta attention, such as key_bits=4,threshold=1.1, or as JSON, or "
        "'off' (default: the source's, else the library's)",
    )
    add(
        "--mlx-lm-shim",
        action="store_true",
        help="write delta_model.py, so that mlx_lm.generate --trust-remote-code has the delta",
    )
    add("--tokenizer-from", help="directory or hub name to take the tokenizer from")
    add("--gguf-file", help="which file of a directory or repository with several")
    add(
        "--i2s-layout",
        choices=["x86", "arm"],
        default="x86",
        help="machine that an I2_S file was made for (default x86)",
    )
    add("--revision", help="revision of a hub repository")
    add("--shard-size", default="1GB", help="largest weight file (default 1GB)")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--dry-run", action="store_true", help="print the plan and sizes; write nothing")
    add(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare the result with the source",
    )
    add("--quiet", action="store_true", help="no plan and no progress")
    return parser


def make_job(args: argparse.Namespace) -> Any:
    """The conversion that a command line asks for.

    Raises:
        ConvertError: An option's value is wrong.
    """
    from .converting import Job
    from .plan import Options
    from .sources import SourceOptions

    target = TARGETS[args.target]

    def bits(given: int | None, default: int) -> int | None:
        value = default if given is None else given
        return None if value == 16 else value

    options = Options(
        bits=bits(args.q_bits, target.bits),
        group_size=target.group_size if args.q_group_size is None else args.q_group_size,
        embed_bits=bits(args.embed_bits, target.embed_bits),
        requantize=args.q_bits is not None,
        requantize_embed=args.embed_bits is not None,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        ternary=args.ternary,
        shard_bytes=parse_size(args.shard_size),
    )
    context = target.context if args.max_context is None else args.max_context
    if context < 1:
        raise ConvertError(f"--max-context must be 1 or more but is {context}.")
    memory = target.memory if args.device_memory is None else parse_memory(args.device_memory)
    output = args.output
    if output is None:
        name = re.sub(r"\.gguf$", "", Path(args.source.rstrip("/")).name) or "model"
        output = f"{name}-{args.target}"
    return Job(
        source=args.source,
        output=Path(output),
        target=args.target,
        options=options,
        reading=SourceOptions(args.tokenizer_from, args.gguf_file, args.revision, args.i2s_layout),
        delta=_delta(args.delta),
        shim=args.mlx_lm_shim,
        context=context,
        kv_bits=target.kv_bits if args.kv_bits is None else args.kv_bits,
        memory=memory,
        int8_activations=args.int8_activations,
        overwrite=args.overwrite,
        verify=args.verify,
        quiet=args.quiet,
    )


def _delta(text: str | None) -> Any:
    """The value of --delta.

    Raises:
        ConvertError: It is neither a written setting nor a JSON object.
    """
    if text is None:
        return "source"
    if text == "off":
        return None
    if "=" in text and not text.lstrip().startswith("{"):
        from mlx_delta.config import DeltaConfig
        from mlx_delta.notation import read_fields

        try:
            return read_fields(text, DeltaConfig)
        except ValueError as error:
            raise ConvertError(f"--delta {text[:60]}: {error}") from error
    value = parse_json(text.encode(), "--delta")
    if not isinstance(value, dict):
        raise ConvertError(f"--delta must be a JSON object or 'off' but is {text[:60]!r}.")
    return value


def parse_size(text: str) -> int:
    """Bytes from ``1GB``, ``500 MB`` or a plain number.

    Raises:
        ConvertError: It is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(kb|mb|gb|b)?\s*", text.lower())
    if not match:
        raise ConvertError(f"--shard-size must look like 1GB but is {text[:40]!r}.")
    return int(float(match[1]) * {"kb": 1e3, "mb": 1e6, "gb": 1e9}.get(match[2] or "b", 1))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    plain_output()
    try:
        if arguments[:1] == ["check"] and len(arguments) > 1:
            return _check(arguments[1:])
        if arguments[:1] == ["verify"] and len(arguments) > 1:
            from .verify import main as verify

            return verify(arguments[1:])
        return _convert(arguments)
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        print(
            f"error: {reason}; free some space or memory and run it again.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print(
            "\nInterrupted. What is done stays in the .partial directory; run "
            "the same command again to continue.",
            file=sys.stderr,
        )
        return 130
    return 1


def _convert(arguments: list[str]) -> int:
    """Convert, or print the plan."""
    args = make_parser().parse_args(arguments)
    job = make_job(args)
    from .converting import convert, describe, prepare

    if args.dry_run:
        print(describe(*prepare(job)))
        print("dry run: nothing was written")
        return 0
    convert(job)
    return 0


def _check(arguments: list[str]) -> int:
    """Check directories against the rules of mlx-swift-lm's loader."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_delta.convert check",
        description="Check whether mlx-swift-lm, on iPads and iPhones, can load a directory.",
    )
    parser.add_argument("directory", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")
    args = parser.parse_args(arguments)
    from .check import check_directory

    found = {str(folder): check_directory(folder) for folder in args.directory}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for folder, problems in found.items():
            print(f"{folder}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
            for problem in problems:
                print(f"  {problem}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
