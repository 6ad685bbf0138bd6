"""Prompts that are kept: --cache-dir, and python -m mlx_delta.cache_prompt."""

from __future__ import annotations

import functools
import importlib

import pytest

import mlx_delta
from mlx_delta.cache_prompt.command import main as cache_prompt
from tests.generate.test_saved_prompts import DELTA, DOCUMENT, QUESTION

LONG = DOCUMENT * 3
MORE = " The wind went on" * 3


@pytest.fixture(autouse=True)
def loads_once(monkeypatch):
    """Most of the time of these tests would be loading one model again and again."""
    command = importlib.import_module("mlx_delta.generate.command")
    monkeypatch.setattr(command, "load", lambda name, delta, **_: loaded(str(name), delta))


@functools.cache
def loaded(name: str, delta):
    return mlx_delta.load(name, delta)


@pytest.fixture
def read(capsys):
    """Run cache_prompt; its status, output and errors."""

    def call(*flags: object) -> tuple[int, str, str]:
        status = cache_prompt([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return call


def test_the_second_time_the_prompt_is_known(run, chat_path, tmp_path):
    flags = ("--model", chat_path, "-p", LONG, *DELTA)
    plain = run(*flags)
    first = run(*flags, "--cache-dir", tmp_path)
    second = run(*flags, "--cache-dir", tmp_path)
    assert plain["text"] == first["text"] == second["text"]
    assert first["prompt_tokens"] == plain["prompt_tokens"] and second["prompt_tokens"] == 1
    assert first["notes"] == second["notes"] == ""


def test_a_conversation_goes_on_from_its_answer(run, chat_path, tmp_path):
    raw = ("--model", chat_path, "--ignore-chat-template", *DELTA)
    first = run(*raw, "-p", LONG, "--cache-dir", tmp_path)
    whole = LONG + first["text"] + MORE
    again = run(*raw, "-p", whole, "--cache-dir", tmp_path)
    assert again["text"] == run(*raw, "-p", whole)["text"]
    assert again["prompt_tokens"] < first["prompt_tokens"] / 4


def test_a_system_prompt_is_read_once(run, chat_path, tmp_path):
    flags = ("--model", chat_path, "--system-prompt", LONG, *DELTA)
    kept = ("--cache-dir", tmp_path)
    first = run(*flags, "-p", "One thing", *kept)
    other = run(*flags, "-p", "Quite another", *kept)
    assert other["prompt_tokens"] < first["prompt_tokens"] / 4
    assert other["text"] == run(*flags, "-p", "Quite another")["text"]


def test_the_third_prompt_goes_on_where_two_parted(run, chat_path, tmp_path):
    flags = ("--model", chat_path, "--ignore-chat-template", *DELTA, "--cache-dir", tmp_path)
    others = (QUESTION * 20, MORE * 6, QUESTION)
    counts = [run(*flags, "-p", LONG + "." + more)["prompt_tokens"] for more in others]
    assert counts[2] < counts[0] / 4 and counts[1] > counts[0] / 2


def test_what_was_read_before_an_interruption_is_kept(
    run, command_line, chat_path, tmp_path, monkeypatch
):
    """Ctrl-C while the prompt is read, and while it is answered."""
    command = importlib.import_module("mlx_delta.generate.command")
    flags = ["--model", str(chat_path), "-p", LONG, *DELTA, "--cache-dir", str(tmp_path)]
    plain = run(*flags[:-2])

    def interrupted(name: str, at: int) -> None:
        method, calls = getattr(command.MemoryWatch, name), []

        def stop(*args):
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt
            return method(*args)

        with monkeypatch.context() as patch:
            patch.setattr(command.MemoryWatch, name, stop)
            assert command_line(*flags, "--prefill-step-size", "100")[0] == 130

    interrupted("progress", 4)  # called before it begins, too
    interrupted("token", 3)
    again = run(*flags)
    assert again["text"] == plain["text"] and again["prompt_tokens"] == 1


@pytest.mark.parametrize("more", [["--no-delta"], ["--delta-key-bits", "4"]], ids=["dense", "4"])
def test_a_prompt_of_another_setting_is_not_taken(run, chat_path, tmp_path, more):
    flags = ("--model", chat_path, "-p", LONG, "--cache-dir", tmp_path)
    run(*flags)
    first, second = run(*flags, *more), run(*flags, *more)
    assert first["prompt_tokens"] > 100 and second["prompt_tokens"] <= 32
    assert first["text"] == second["text"]


def test_a_directory_that_can_not_be_used_is_done_without(run, chat_path, tmp_path):
    (tmp_path / "file").write_text("mine")
    found = run("--model", chat_path, "-p", LONG, "--cache-dir", tmp_path / "file")
    assert found["text"] and found["notes"].startswith("note: [prefixes] can't write in")
    assert found["notes"].count("\n") == 1 and (tmp_path / "file").read_text() == "mine"


def test_a_prompt_is_cached_for_generate(run, read, chat_path, tmp_path):
    file, model = tmp_path / "x.safetensors", ("--model", chat_path)
    kept = ("--prompt-cache-file", file, "--cache-dir", tmp_path / "kept")
    status, out, err = read(*model, "-p", DOCUMENT, *kept, *DELTA)
    assert status == 0 and err == "" and str(file) in out and "tokens-per-sec" in out
    whole = run(*model, "-p", DOCUMENT + QUESTION, *DELTA)
    asked = run(*model, "--prompt-cache-file", file, "-p", QUESTION)
    looked_up = run(*model, "-p", DOCUMENT + QUESTION, "--cache-dir", tmp_path / "kept", *DELTA)
    assert asked["text"] == looked_up["text"] == whole["text"]
    assert looked_up["prompt_tokens"] < 30 < whole["prompt_tokens"]
    status, out, _ = read(*model, "-p", DOCUMENT, "--cache-dir", tmp_path / "kept", *DELTA)
    assert status == 0 and "of them known already" in out


def test_cache_prompt_says_what_it_lacks(read, chat_path, tmp_path):
    for flags, message in (
        (["-p", "x"], "give --prompt-cache-file FILE or --cache-dir DIR"),
        (["--cache-dir", tmp_path], "give --prompt or --prompt-file"),
        (["-p", "x", "--prompt-cache-file", tmp_path], "is a directory"),
        (["-p", "x", "--cache-dir", tmp_path, "--cache-budget", "much"], "no number of bytes"),
    ):
        status, out, err = read("--model", chat_path, *flags)
        assert status == 1 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [["--compare"], ["--prompt-cache-file", "x"], ["--draft-model", "x"]],
    ids=lambda flags: flags[0],
)
def test_what_does_not_go_together(command_line, tmp_path, flags):
    status, _, err = command_line("-p", "x", "--cache-dir", tmp_path, *flags)
    assert status == 1 and f"--cache-dir does not go together with {flags[0]}" in err


# Memory.


def test_tokens_are_dropped_beyond_a_size(run, command_line, chat_path):
    flags = ("--model", chat_path, "-p", LONG, *DELTA)
    bounded = run(*flags, "--max-kv-size", "64")
    assert bounded["delta"]["max_size"] == 64
    assert bounded["cache_bytes"] < run(*flags)["cache_bytes"] * 0.6
    status, _, err = command_line("-p", "x", "--model", str(chat_path), "--max-kv-size", "20")
    assert status == 1 and "max_size must be a whole number from 320" in err


def test_what_drops_tokens_is_kept_too(run, chat_path, tmp_path):
    flags = ("--model", chat_path, "-p", LONG, *DELTA, "--max-kv-size", "64")
    first, second = (run(*flags, "--cache-dir", tmp_path) for _ in range(2))
    assert first["text"] == second["text"] == run(*flags)["text"]
    assert second["prompt_tokens"] == 1 < first["prompt_tokens"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("1MB", "use a smaller or more strongly quantized model"),
        ("none", "is no number of bytes; write it like 6GB"),
    ],
)
def test_a_limit_that_is_too_small(command_line, limit, message):
    status, out, err = command_line("-p", "x", "--memory-limit", limit)
    assert status == 1 and out == "" and message in err and err.count("\n") == 1


def test_what_would_fit_is_said(monkeypatch, command_line, tmp_path):
    """Before the model is loaded."""
    monkeypatch.setattr("mlx_delta.measure.limit.free_memory", lambda: (10**8, "the limit"))
    monkeypatch.setattr(importlib.import_module("mlx_delta.generate.command"), "load", None)
    file = tmp_path / "long.txt"
    file.write_text("a word and another one, " * 4000)
    status, _, err = command_line("--prompt-file", str(file), "--memory-limit", "6GB")
    assert status == 1 and "demo with 2" in err and "tokens fit as it is" in err
    assert "but the limit leaves 100 MB" in err


def test_a_prompt_ends_before_memory_does(monkeypatch, command_line, chat_path):
    free = iter([10**9, 10**9, 5, 5])
    monkeypatch.setattr("mlx_delta.measure.limit.free_memory", lambda *_: (next(free), "the limit"))
    flags = ("--model", str(chat_path), "-p", LONG, "--prefill-step-size", "16")
    status, out, err = command_line(*flags)
    assert status == 1 and err.startswith("error: stopped after ") and err.count("\n") == 1
    assert "of the prompt: the next ones take about" in err and "the limit leaves 0 MB" in err


def test_the_model_is_loaded_with_room_to_spare(run, chat_path):
    assert run("--model", chat_path, "-p", "Hi", "--memory-limit", "900GB")["text"]
