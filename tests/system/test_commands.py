"""What all commands share: a list, help with defaults, errors in one line, plain terminals."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Iterator

import pytest

from mlx_delta.__main__ import COMMANDS, MAINS, main
from mlx_delta.system import cli
from mlx_delta.system.cli import HelpFormatter, plain_output, run_command

OURS = [name for name in COMMANDS if name != "generate"]  # which has mlx-lm's parser too


def module_of(name: str):
    return importlib.import_module(MAINS.get(name, f"mlx_delta.{name}.command"))


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


@pytest.mark.parametrize("name", OURS)
def test_help_says_every_default(name):
    module = module_of(name)
    make = getattr(module, "build_parser", None) or module.make_parser
    for parser in parsers(make()):
        formatter = parser._get_formatter()
        for action in parser._actions:
            if action.nargs == 0 or action.required or action.default is None:
                continue
            text = formatter._get_help_string(action) or ""
            assert "default" in text.lower(), (parser.prog, action.option_strings)
        parser.format_help()  # no stray % in a text


def test_defaults_are_added_where_help_lacks_them():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--length", type=int, default=7, help="Tokens")
    parser.add_argument("--seed", type=int, default=0, help="Seed")
    parser.add_argument("--fast", action="store_true", help="Fast.")
    parser.add_argument("--name", help="A name.")
    text = " ".join(parser.format_help().split())
    assert "--length LENGTH Tokens. Default: 7." in text
    assert "--seed SEED Seed. Default: 0." in text and text.count("efault") == 2


@pytest.mark.parametrize("name", ["generate", "chat", "server"])
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--kv", "foo"], ["argument --kv: invalid choice: 'foo' (choose from ", "balanced"]),
        (
            ["--kv", "balanced", "--key-bits", "3"],
            ["unrecognized arguments: --key-bits 3 (did you mean ", "--delta-key-bits"],
        ),
        (["--kv"], ["argument --kv: expected one argument"]),
    ],
    ids=["no such kind", "no such flag", "no kind"],
)
def test_a_flag_that_can_not_be_used_is_told_in_one_line(capsys, name, flags, parts):
    with pytest.raises(SystemExit) as stop:
        module_of(name).main(flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    assert err.endswith(f"; `python -m mlx_delta.{name} --help` lists the flags.\n")
    assert all(part in err for part in parts)


@pytest.mark.parametrize("name", ["generate", "chat", "server"])
def test_a_kind_and_a_field_of_it_contradict_each_other(capsys, name):
    assert module_of(name).main(["--kv", "balanced", "--delta-key-bits", "3"]) == 1
    assert capsys.readouterr().err == (
        "error: --kv balanced and --delta-key-bits both give key_bits; drop one.\n"
    )


def test_the_package_lists_its_commands(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out.splitlines()
    for name, text in COMMANDS.items():
        assert f"  {name:12}  {text}" in out
    assert main(["evalute"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: unknown command 'evalute' (did you mean evaluate")
    assert err.endswith(f"; known are {', '.join(COMMANDS)}.\n") and err.count("\n") == 1


def test_a_command_runs_by_its_name(capsys, tmp_path):
    assert main(["evaluate", "--show", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error: [evaluate] there is no results file")


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("generate", ["--model", "no/such/model/here", "-p", "x"]),
        ("convert", ["/no/such/checkpoint"]),
        ("calibrate", ["--model", "no/such/model/here", "--sparsity", "0.1"]),
        ("evaluate", ["--model", "no/such/model/here"]),
        ("benchmark", ["--model", "no/such/model/here"]),
        ("server", ["--model", "no/such/model/here", "--port", "0"]),
        ("pictures", ["tradeoff", "/no/such/file.json", "-o", "x"]),
    ],
)
def test_an_error_is_one_line_of_one_form(capsys, name, argv):
    assert module_of(name).main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_an_ascii_terminal_shows_what_it_can(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run_command(lambda: print("0.925 ±0.061 – θ 1.1, 日本"), "less") == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"0.925 +-0.061 - t 1.1, ??\n"


def test_a_terminal_with_all_characters_is_left_alone(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    plain_output()
    print("±")
    sys.stdout.flush()
    assert raw.getvalue().decode() == "±\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli.plain_output()  # no stream of Python's own: nothing to change


def test_a_note_of_ours_is_shown_without_its_place_in_the_code():
    assert run_command(lambda: None, "less") == 0
    own, other = UserWarning("[kernels] left out."), UserWarning("of another library")
    assert warnings.formatwarning(own, UserWarning, "a.py", 3) == "note: [kernels] left out.\n"
    assert "a.py:3: UserWarning: of" in warnings.formatwarning(other, UserWarning, "a.py", 3)
