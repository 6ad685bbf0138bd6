"""The delta's setting on the command lines: ``--delta key_bits=4,level=0.1``."""

from __future__ import annotations

import argparse
from typing import Any, Protocol

from mlx_delta.config import DeltaConfig
from mlx_delta.notation import read_fields

from .kv import HELP, KV, kv_fields

# The flags of single fields; --delta can say them all.
FIELDS = (
    "level",
    "threshold",
    "threshold_mode",
    "window",
    "block_size",
    "sinks",
    "key_bits",
    "value_bits",
    "tiles",
)


class Arguments(Protocol):
    """A parser, or a group of its arguments."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As argparse's."""


def add_delta_argument(parser: Arguments) -> None:
    """``--delta`` alone, for commands whose settings say the rest."""
    parser.add_argument(
        "--delta",
        metavar="SETTING",
        help="What differs from the model's own setting, such as key_bits=4,level=0.1: any "
        "field of DeltaConfig. Default: nothing.",
    )


def add_delta_arguments(parser: argparse.ArgumentParser) -> None:
    """``--delta``, flags for the commonest fields, wishes, ``--delta-paper`` and ``--no-delta``.

    :func:`delta_fields` reads those of fields.
    """
    group = parser.add_argument_group("hybrid delta attention")
    add_delta_argument(group)
    wish = group.add_mutually_exclusive_group()
    wish.add_argument(
        "--delta-sparsity",
        type=float,
        help="Share of the keys' deltas outside the window to be zero, by the model's calibration.",
    )
    wish.add_argument(
        "--delta-kl",
        type=float,
        help="Or: KL divergence from dense attention to stay below, in nats per token.",
    )
    wish.add_argument(
        "--delta-level", type=float, help="Or: what a run of held values costs; 0 holds nothing."
    )
    wish.add_argument("--delta-threshold", type=float, help="Or: change up to which a key is held.")
    group.add_argument(
        "--delta-threshold-mode",
        choices=("relative", "absolute"),
        help="Threshold relative to each block's spread of keys, or in the keys' own units.",
    )
    group.add_argument("--delta-window", type=int, help="Tokens before a query's block kept exact.")
    group.add_argument("--delta-block-size", type=int, help="Tokens in a block.")
    group.add_argument("--delta-sinks", type=int, help="Keys at the start kept exact.")
    group.add_argument(
        "--delta-key-bits",
        type=_number,
        metavar="BITS",
        help="Store far keys in so many bits (2 to 8, such as 3.5): what changed of held ones, or "
        "with --delta key_format=codes all of them.",
    )
    group.add_argument(
        "--delta-value-bits",
        type=_number,
        metavar="BITS",
        help="Store far values in so many bits (2 to 8), or all in 16.",
    )
    group.add_argument("--kv", choices=tuple(KV), help=HELP)
    group.add_argument(
        "--delta-paper",
        action="store_true",
        help="The paper's own setting: one chain, absolute threshold 0.6, a window of 5 %%.",
    )
    group.add_argument(
        "--tiles",
        "--delta-tiles",
        dest="delta_tiles",
        type=float,
        metavar="SHARE",
        help="Compute only so much of a long prompt's attention, such as 0.95.",
    )
    group.add_argument("--no-delta", action="store_true", help="Attend densely.")


def delta_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that ``--delta`` and the flags beside it name, with their values.

    They are for :meth:`DeltaConfig.changed`, of the model's own setting or the paper's.

    Raises:
        ValueError: ``--delta`` is wrong, or a flag says a field again.
    """
    fields = read_fields(args.delta or "", DeltaConfig)
    for name in FIELDS:
        value = getattr(args, f"delta_{name}", None)
        if value is None:
            continue
        if name in fields:
            raise ValueError(f"--delta {args.delta} and {_flag(name)} both give {name}; drop one.")
        fields[name] = value
    kind = getattr(args, "kv", None)
    for name, value in kv_fields(kind).items() if kind else ():
        if name in fields:
            raise ValueError(
                f"--kv {kind} and {flag_of_field(args, name)} both give {name}; drop one."
            )
        fields[name] = value
    return fields


def flag_of_field(args: argparse.Namespace, name: str) -> str:
    """The flag that gave a field, as messages name it."""
    kind = getattr(args, "kv", None)
    if kind and name in kv_fields(kind) and name not in read_fields(args.delta or "", DeltaConfig):
        if getattr(args, f"delta_{name}", None) is None:
            return f"--kv {kind}"
    return _flag(name) if getattr(args, f"delta_{name}", None) is not None else f"--delta {name}"


def _number(text: str) -> float:
    """A number, whole where it is written so."""
    return int(text) if text.strip().isdecimal() else float(text)


def _flag(name: str) -> str:
    return f"--delta-{name.replace('_', '-')}"
