"""The command line of a conversion, in this project's words and in mlx-lm's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from mlx_delta.system.cli import HelpFormatter, Parser

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
    parser = Parser(
        prog="python -m mlx_delta.convert",
        formatter_class=HelpFormatter,
        description="Convert Llama and BitNet checkpoints (Hugging Face safetensors, GGUF, "
        "mlx-lm) for MLX on Macs, iPads and iPhones.",
        epilog=f"Presets of --target: {presets}. Also: python -m mlx_delta.convert check DIR.",
    )
    add = parser.add_argument
    add("source", nargs="?", help="directory, .gguf file or hub name (owner/name)")
    add(
        "-o",
        "--output",
        "--mlx-path",
        help="directory to make (default: the source's name and the target)",
    )
    add("--target", choices=list(TARGETS), default="mac", help="kind of device (default: mac)")
    add(
        "--q-bits",
        type=int,
        help="bits of the layers' weights: 2, 3, 4, 5, 6, 8; 16 for none (default: 4; a source "
        "that is quantized already keeps its own)",
    )
    add(
        "--q-group-size",
        type=int,
        help="weights that share a scale: 32, 64 or 128 (default: 64)",
    )
    add(
        "--embed-bits",
        type=int,
        help="bits of embedding and head; 16 for none (default: the target's)",
    )
    add(
        "--dtype",
        choices=list(DTYPES),
        help="of what is not quantized, and of scales (default: the source's)",
    )
    add(
        "--ternary",
        choices=["auto", "affine", "packed"],
        default="auto",
        help="layout of ternary layers (default: auto, which is packed for bitnet and affine for "
        "llama)",
    )
    add(
        "--float-activations",
        dest="int8_activations",
        action="store_false",
        help="ternary models: do not let mlx_delta round activations to int8, as they were trained",
    )
    add("--max-context", type=int, help="tokens to plan memory for (default: the target's)")
    add(
        "--kv-bits",
        type=int,
        choices=[4, 8, 16],
        help="of the key-value cache, for the same (default: the target's)",
    )
    add("--device-memory", help="the device's memory, such as 8GB (default: the target's)")
    add(
        "--delta",
        help="setting of hybrid delta attention, such as key_bits=4, as JSON, or 'off' (default: "
        "the source's, else the library's)",
    )
    add(
        "--mlx-lm-shim",
        action="store_true",
        help="write delta_model.py, so that mlx_lm.generate --trust-remote-code has the delta",
    )
    add(
        "--tokenizer-from",
        help="directory, tokenizer.json, tokenizer.model or hub name to take the tokenizer from "
        "(default: the source)",
    )
    add("--gguf-file", help="which file of a directory or repository with several")
    add(
        "--i2s-layout",
        choices=["x86", "arm"],
        default="x86",
        help="machine that an I2_S file was made for (default: x86)",
    )
    add("--revision", help="revision of a hub repository (default: its main one)")
    add("--shard-size", default="1GB", help="largest weight file (default: 1GB)")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--dry-run", action="store_true", help="print the plan and sizes; write nothing")
    add(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare the result with the source",
    )
    add("--quiet", action="store_true", help="no plan and no progress")
    words = parser.add_argument_group("as in mlx_lm.convert")
    words.add_argument("--hf-path", "--model", dest="model", help="the source")
    words.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="quantize, as is done without it, too: --q-bits 16 --embed-bits 16 does not",
    )
    words.add_argument(
        "-d",
        "--dequantize",
        action="store_true",
        help="no quantized weights: --q-bits 16 --embed-bits 16",
    )
    words.add_argument("--q-mode", default="affine", help="only affine, MLX's own (default)")
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
    source = read_source(args)
    if args.q_mode != "affine":
        raise ConvertError(f"--q-mode must be affine but is {args.q_mode[:40]!r}.")
    if args.dequantize:
        if args.quantize or args.q_bits not in (None, 16) or args.embed_bits not in (None, 16):
            raise ConvertError("--dequantize leaves nothing quantized; drop -q and the bits.")
        args.q_bits = args.embed_bits = 16

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
        name = re.sub(r"\.gguf$", "", Path(source.rstrip("/")).name) or "model"
        output = f"{name}-{args.target}"
    return Job(
        source=source,
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


def read_source(args: argparse.Namespace) -> str:
    """The source, from its place or from mlx-lm's option.

    Raises:
        ConvertError: It is not named, or twice.
    """
    named = [name for name in (args.source, args.model) if name is not None]
    if len(named) != 1:
        raise ConvertError(
            "name the model to convert: a directory, a .gguf file or a hub name (--help lists "
            "all options)."
            if not named
            else f"two sources are named, {named[0][:60]!r} and {named[1][:60]!r}; give one."
        )
    return str(named[0])


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

        try:
            return DeltaConfig.parse(text).to_dict()
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
