"""``--delta key_bits=4,threshold=1.1`` and the flags beside it."""

from __future__ import annotations

import argparse

import pytest

from mlx_delta import DeltaConfig
from mlx_delta.system.arguments import (
    add_delta_argument,
    add_delta_arguments,
    delta_from_arguments,
    given_flags,
)

OWN = DeltaConfig(threshold=1.5, key_bits=8)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_delta_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], OWN),
        (["--delta", "key_bits=4,threshold=1.1"], DeltaConfig(threshold=1.1, key_bits=4)),
        (["--delta-key-bits", "4", "--delta-threshold", "1.1"], DeltaConfig(1.1, key_bits=4)),
        (["--delta", "threshold=1.1", "--delta-key-bits", "4"], DeltaConfig(1.1, key_bits=4)),
        (["--delta", "key_bits=none"], DeltaConfig(1.5)),
        (["--delta-paper"], DeltaConfig.paper()),
        (["--delta-paper", "--delta-threshold", "0.3"], DeltaConfig.paper(0.3)),
        (["--delta-paper", "--delta", "threshold=0.3"], DeltaConfig.paper(0.3)),
        (["--delta-sinks", "0"], DeltaConfig(1.5, key_bits=8, sinks=0)),
        (["--no-delta"], None),
    ],
)  # fmt: skip
def test_flags_change_the_models_own_setting(flags, expected):
    assert delta_from_arguments(parse(*flags), OWN) == expected


def test_a_dense_models_setting_is_the_default_one_once_flags_ask_for_it():
    assert delta_from_arguments(parse(), None) is None
    assert delta_from_arguments(parse("--delta", "key_bits=4"), None) == DeltaConfig(key_bits=4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-delta", "--delta", "key_bits=4"], "--no-delta and --delta contradict each other"),
        (["--no-delta", "--delta-sinks", "0"], "--no-delta and --delta-sinks contradict"),
        (["--no-delta", "--delta-paper"], "--no-delta and --delta-paper contradict"),
        (
            ["--delta", "key_bits=4", "--delta-key-bits", "8"],
            "--delta key_bits=4 and --delta-key-bits both give key_bits; drop one.",
        ),
        (["--delta", "bits=4"], "unknown option 'bits' (did you mean key_bits"),
        (["--delta-threshold", "-1"], "threshold must be >= 0 but got -1.0"),
    ],
)
def test_contradictions_are_refused(flags, message):
    with pytest.raises(ValueError) as error:
        delta_from_arguments(parse(*flags), OWN)
    assert message in str(error.value)


def test_a_command_may_have_the_written_form_alone():
    parser = argparse.ArgumentParser()
    add_delta_argument(parser)
    args = parser.parse_args(["--delta", "window=0"])
    assert delta_from_arguments(args, DeltaConfig()) == DeltaConfig(window=0)
    assert given_flags(args) == ["--delta"] and given_flags(parser.parse_args([])) == []
