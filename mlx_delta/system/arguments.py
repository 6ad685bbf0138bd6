"""The delta's setting on the command lines: ``--delta key_bits=4,threshold=1.1``."""

from __future__ import annotations

import argparse
from typing import Any, Protocol

from mlx_delta.config import KEY_BITS, VALUE_BITS, DeltaConfig

# The flags of single fields; --delta can say them all.
FIELDS = ("threshold", "threshold_mode", "window", "block_size", "sinks", "key_bits", "value_bits")


class Arguments(Protocol):
    """A parser, or a group of its arguments."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As argparse's."""


def add_delta_argument(parser: Arguments) -> None:
    """``--delta`` alone, for commands whose settings say the rest."""
    parser.add_argument(
        "--delta",
        metavar="SETTING",
        help="What differs from the model's own setting, such as key_bits=4,threshold=1.1: any "
        "field of DeltaConfig. Default: nothing.",
    )


def add_delta_arguments(parser: argparse.ArgumentParser) -> None:
    """``--delta``, a flag for each of the commonest fields, ``--delta-paper`` and ``--no-delta``.

    :func:`delta_from_arguments` reads them.
    """
    group = parser.add_argument_group("hybrid delta attention")
    add_delta_argument(group)
    add = group.add_argument
    add("--delta-threshold", type=float, help="Change up to which a key is held.")
    add(
        "--delta-threshold-mode",
        choices=("relative", "absolute"),
        help="Threshold relative to each block's spread of keys, or in the keys' own units.",
    )
    add("--delta-window", type=int, help="Tokens before a query's block kept exact.")
    add("--delta-block-size", type=int, help="Tokens in a block.")
    add("--delta-sinks", type=int, help="Keys at the start kept exact.")
    add(
        "--delta-key-bits",
        type=int,
        choices=KEY_BITS,
        help="Store far keys packed: changed values in 16 bits, or as codes of so many bits.",
    )
    add("--delta-value-bits", type=int, choices=VALUE_BITS, help="Store values in so many bits.")
    add(
        "--delta-paper",
        action="store_true",
        help="The paper's own setting: one chain, absolute threshold 0.6, a window of 5 %%.",
    )
    add("--no-delta", action="store_true", help="Attend densely.")


def delta_from_arguments(args: argparse.Namespace, own: DeltaConfig | None) -> DeltaConfig | None:
    """The setting that the flags ask for.

    Args:
        args: From a parser with :func:`add_delta_arguments` or :func:`add_delta_argument`.
        own: The model's own setting, which the flags change and ``--delta-paper`` replaces;
            without flags it stays, be it ``None``.

    Returns:
        The setting, or ``None`` for dense attention.

    Raises:
        ValueError: A value is wrong, or two flags contradict each other or say the same thing.
    """
    flags = given_flags(args)
    if getattr(args, "no_delta", False):
        if flags:
            raise ValueError(f"--no-delta and {flags[0]} contradict each other; drop one.")
        return None
    if not flags:
        return own
    base = DeltaConfig.paper() if getattr(args, "delta_paper", False) else own
    written = args.delta or ""
    fields = {field: getattr(args, f"delta_{field}", None) for field in FIELDS}
    for field, value in fields.items():
        if value is None:
            continue
        if any(part.partition("=")[0].strip() == field for part in written.split(",")):
            flag = f"--delta-{field.replace('_', '-')}"
            raise ValueError(f"--delta {written} and {flag} both give {field}; drop one.")
        written += f"{',' if written else ''}{field}={value}"
    return DeltaConfig.parse(written, base)


def given_flags(args: argparse.Namespace) -> list[str]:
    """Those of the delta's flags that were given, as they are written."""
    names = ["delta", *(f"delta_{field}" for field in FIELDS), "delta_paper"]
    values = {name: getattr(args, name, None) for name in names}
    given = [name for name, value in values.items() if value is not None and value is not False]
    return [f"--{name.replace('_', '-')}" for name in given]
