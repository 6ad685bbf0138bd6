"""``--delta key_bits=4,level=0.1`` and the flags beside it."""

from __future__ import annotations

import argparse

import pytest

from mlx_delta import DeltaConfig
from mlx_delta.system.arguments import (
    add_delta_argument,
    add_delta_arguments,
    delta_fields,
    flag_of_field,
)
from mlx_delta.system.kv import KV


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_delta_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {}),
        (["--delta", "key_bits=4,level=0.1"], {"key_bits": 4, "level": 0.1}),
        (["--delta-key-bits", "4"], {"key_bits": 4}),
        (["--delta", "level=0.1", "--delta-key-bits", "3.5"], {"level": 0.1, "key_bits": 3.5}),
        (["--delta", "key_bits=none"], {"key_bits": None}),
        (["--delta-sinks", "0"], {"sinks": 0}),
        (["--delta-level", "0.1"], {"level": 0.1}),
        (["--kv", "balanced", "--delta-sinks", "0"], {"sinks": 0, **KV["balanced"]}),
        (["--kv", "exact"], KV["exact"]),
        (["--kv", "small"], KV["small"]),
        (["--delta-paper"], {}),
        (["--no-delta"], {}),
    ],
)
def test_both_forms_give_fields(flags, expected):
    assert delta_fields(parse(*flags)) == expected
    DeltaConfig().changed(**expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--delta", "key_bits=4", "--delta-key-bits", "8"],
            "--delta key_bits=4 and --delta-key-bits both give key_bits; drop one.",
        ),
        (
            ["--kv", "small", "--delta-key-bits", "8"],
            "--kv small and --delta-key-bits both give key_bits; drop one.",
        ),
        (["--delta", "bits=4"], "unknown option 'bits' (did you mean key_bits"),
        (["--delta", "sinks"], "sinks lacks a value"),
    ],
)
def test_what_contradicts_or_is_unknown_is_refused(flags, message):
    with pytest.raises(ValueError) as error:
        delta_fields(parse(*flags))
    assert message in str(error.value)


def test_messages_name_the_flag_that_was_given():
    args = parse("--delta", "sinks=0", "--delta-window", "0")
    assert flag_of_field(args, "window") == "--delta-window"
    assert flag_of_field(args, "sinks") == "--delta sinks"


def test_a_command_may_have_the_written_form_alone():
    parser = argparse.ArgumentParser()
    add_delta_argument(parser)
    assert delta_fields(parser.parse_args(["--delta", "window=0"])) == {"window": 0}
