"""The delta that a command line asks for, with the flags of ``add_delta_arguments``."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_delta.config import DeltaConfig
from mlx_delta.loading import MODEL_SETTING, find_model, read_config, read_setting
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.system.arguments import delta_fields, flag_of_field


def wish_asked_for(args: argparse.Namespace) -> str | None:
    """The flag that asks for a level by what it does, if one is given."""
    if args.delta_sparsity is not None:
        return "--delta-sparsity"
    return "--delta-kl" if args.delta_kl is not None else None


def check_delta_flags(args: argparse.Namespace) -> None:
    """Refuse flags of the delta that contradict each other.

    Raises:
        ValueError: Two of them.
    """
    fields, wish = delta_fields(args), wish_asked_for(args)
    given = [flag_of_field(args, name) for name in fields]
    given += ["--delta-paper"] if args.delta_paper else []
    given += [] if wish is None else [wish]
    if args.no_delta and given:
        raise ValueError(f"--no-delta and {given[0]} contradict each other; drop one.")
    if wish is not None and args.delta_paper:
        raise ValueError(f"--delta-paper and {wish} contradict each other; drop one.")
    for name in ("level", "threshold"):
        if wish is not None and name in fields:  # the parser knows of the flags only
            raise ValueError(f"{wish} and --delta {name} contradict each other; drop one.")


def delta_asked_for(args: argparse.Namespace, model: str) -> Any:
    """The argument ``delta`` of ``load``; what the flags do not name stays the model's own.

    Raises:
        ValueError: A level is to be found, and the model was not calibrated.
    """
    if args.no_delta:
        return None
    given, wish = delta_fields(args), wish_asked_for(args)
    if args.delta_paper:
        return DeltaConfig.paper().changed(**given)
    if not given and wish is None:
        return MODEL_SETTING
    path = find_model(model)
    own = read_setting(path, read_config(path)) or DeltaConfig()
    if wish is not None:
        if not isinstance(own.sensitivities, Sensitivities):
            raise ValueError(
                f"{wish} needs a calibrated model, but {model!r} has no sensitivities; run "
                f"`python -m mlx_delta.calibrate --model {model} --sparsity 0.65` first, or set "
                "--delta-level."
            )
        given["level"] = own.sensitivities.level_for(args.delta_sparsity, args.delta_kl)
    return own.changed(**given)
