"""Every number on the command line: what can't be meant is refused by the flag's name."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from mlx_delta.checkpoint.find import find_model
from mlx_delta.generate.command import choose_delta
from mlx_delta.generate.flags import BOUNDS, CHOICES, build_parser, check_delta_flags, flag
from mlx_delta.system.kv import kv_fields
from tests.tiny import write_llama

WRONG = {
    "temp": ["nan", "-1", "inf", "-inf"],
    "top_p": ["7", "-0.1", "nan"],
    "min_p": ["1.5", "-1", "nan"],
    "top_k": ["-5", "4294967296", "4096"],
    "xtc_probability": ["2", "-1", "nan"],
    "xtc_threshold": ["0.6", "-1", "inf"],
    "min_tokens_to_keep": ["0", "-1", "5000"],
    "seed": ["-5", "18446744073709551616"],
    "max_kv_size": ["0", "-1", "4"],
    "prefill_step_size": ["0", "-3"],
    "quantized_kv_start": ["-1"],
    "num_draft_tokens": ["0", "-3"],
    "max_tokens": ["0", "-2"],
    "kv_bits": ["0", "7", "3", "-4"],
    "kv_group_size": ["0", "48", "-32"],
    "delta_threshold": ["nan", "-1", "inf"],
    "delta_level": ["nan", "-1", "inf"],
    "delta_sparsity": ["nan", "-1", "2"],
    "delta_kl": ["nan", "-1"],
    "delta_window": ["-1", "65"],
    "delta_block_size": ["0", "-8"],
    "delta_sinks": ["-1"],
    "delta_tiles": ["nan", "-1", "2"],
}
RIGHT = {
    "temp": ["0", "2.5"],
    "top_p": ["0", "1"],
    "min_p": ["0", "1"],
    "top_k": ["0", "4095"],
    "xtc_probability": ["1"],
    "xtc_threshold": ["0.5"],
    "min_tokens_to_keep": ["4096"],
    "seed": ["0", "18446744073709551615"],
    "max_kv_size": ["5"],
    "prefill_step_size": ["1"],
    "num_draft_tokens": ["1", "1000"],
    "max_tokens": ["-1", "1"],
}
NEEDS = {"max_kv_size": ["--no-delta"], "kv_bits": ["--no-delta"], "kv_group_size": ["--no-delta"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama", max_position_embeddings=20)


def test_every_number_is_in_the_table():
    actions = build_parser()._actions
    numbers = {a.dest for a in actions if a.type in (int, float) and a.choices is None}
    assert numbers == set(WRONG) and set(BOUNDS) | set(CHOICES) < numbers


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_wrong_numbers(command_line, path, name, value):
    flags = [f"{flag(name)}={value}", *NEEDS.get(name, [])]
    status, out, err = command_line("--model", path, "-p", "x", "-m", "2", *flags)
    assert status == 1 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert flag(name) in err or f" {name.removeprefix('delta_')} must be" in err, err


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in RIGHT.items() for v in vs])
def test_numbers_at_the_bounds(command_line, path, name, value):
    flags = [f"{flag(name)}={value}", *NEEDS.get(name, [])]
    sampled = ["--temp", "0.7"] if name != "temp" else []
    status, _, err = command_line("--model", path, "-p", "x", "-m", "4", *sampled, *flags)
    assert status == 0, err


def test_the_help_names_defaults_once():
    text = " ".join(build_parser().format_help().split())
    assert "Sampling temperature. Default: 0.0." in text
    assert text.count("2048") == 1 and "None" not in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-delta", "--max-kv-size", "64", "--kv-bits", "8", "--kv-group-size", "32"],
        ["--max-kv-size", "64", "--kv-bits", "8"],
    ],
    ids=["dense", "delta"],
)
def test_two_ways_to_shrink_a_cache(command_line, path, flags):
    status, out, err = command_line("--model", path, "-p", "x", *flags)
    assert status == 1 and out == "" and "--max-kv-size and --kv-bits do not go together" in err


def test_without_a_seed_texts_differ_and_the_report_says_how_to_repeat_one(command_line, path):
    flags = ("--model", path, "-p", "x", "-m", "12", "--temp", "1")
    texts = [command_line(*flags)[1] for _ in range(3)]
    lines = [text.splitlines() for text in texts]
    assert len({tuple(line[1:2]) for line in lines}) > 1
    seed = lines[0][-1].removeprefix("Seed: ").split()[0]
    again = command_line(*flags, "--seed", seed)[1].splitlines()
    assert again[: again.index("=" * 10, 1)] == lines[0][: lines[0].index("=" * 10, 1)]
    assert "Seed" not in command_line(*flags[:-1], "0")[1]


class Surrogates(io.StringIO):
    def read(self, *_):
        return b"\xff".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (None, "stdin is closed"),
        (io.StringIO(""), "the prompt is empty"),
        (Surrogates(), "stdin is not UTF-8 text"),
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"), "stdin is not UTF-8 text"),
    ],
    ids=["closed", "empty", "surrogates", "no text"],
)
def test_prompts_from_stdin(command_line, path, monkeypatch, stdin, message):
    monkeypatch.setattr(sys, "stdin", stdin)
    status, _, err = command_line("--model", path, "-p", "-")
    assert status == 1 and message in err and err.count("\n") == 1


def test_prompts_without_an_end(command_line, path, monkeypatch):
    conversation = sys.modules["mlx_delta.generate.conversation"]
    monkeypatch.setattr(conversation, "_LONGEST_PROMPT", 1000)
    status, _, err = command_line("--model", path, "--prompt-file", "/dev/zero")
    assert status == 1 and "has no end within 1000 characters" in err


def test_a_text_too_long_for_any_context_is_not_cut_up(command_line, path, tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("night " * 400_000)
    monkeypatch.setattr(
        sys.modules["mlx_delta.generate.command"], "encode", lambda *_: pytest.fail("encoded")
    )
    status, _, err = command_line("--model", path, "--prompt-file", tmp_path / "long.txt")
    assert status == 1 and "more than the model's context of 20 tokens can hold" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--kv exact --delta-sparsity 0.6", "--delta-sparsity and --kv exact contradict"),
        ("--kv exact --delta-threshold 0.5", "--kv exact and --delta-threshold contradict"),
        ("--kv small --delta-paper", "--delta-paper and --kv small contradict"),
        ("--delta level=1 --delta-kl 0.1", "--delta-kl and --delta level contradict"),
    ],
)
def test_flags_that_contradict_each_other_are_named_as_they_were_given(flags, message):
    with pytest.raises(ValueError, match=message):
        check_delta_flags(build_parser().parse_args(["--prompt", "x", *flags.split()]))


@pytest.mark.parametrize(
    "given",
    [
        *("--delta-sparsity 0.6", "--delta-kl 0.0001", "--delta-level 0.1"),
        *("--delta-threshold 0.5", "--delta level=0.1"),
    ],
)
@pytest.mark.parametrize("codes", ["flag", "model"])
def test_of_codes_nothing_is_held(given, codes, tmp_path):
    flags, model = ["--kv", "small"], "demo"
    if codes == "model":
        model = str(shutil.copytree(find_model("demo"), tmp_path / "codes"))
        config = json.loads((tmp_path / "codes" / "config.json").read_text())
        config["delta"] |= kv_fields("small")
        (tmp_path / "codes" / "config.json").write_text(json.dumps(config))
        flags = []
    args = build_parser().parse_args(["--prompt", "x", *flags, *given.split()])
    name = given.partition("=")[0].partition(" 0")[0]
    with pytest.raises(ValueError, match=f"{name} says how much is held, but of keys with"):
        choose_delta(args, model)
