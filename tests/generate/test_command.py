"""``python -m mlx_delta.generate``: what it prints, and what it says when misused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mlx_delta import generate as generate_text
from mlx_delta import load
from mlx_delta.generate import command
from mlx_delta.generate.command import main
from tests.tiny import SMALL, write_llama

PROMPT = "It was a dark night, and the wind was in the trees. " * 12
DELTA = [
    "--delta-threshold",
    "1",
    "--delta-block-size",
    "8",
    "--delta-window",
    "16",
    "--delta-sinks",
    "3",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_llama(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture
def run(capsys, path):
    """Run the command on the tiny model; its status, output and errors."""

    def call(*flags: str, model: str | None = path) -> tuple[int, str, str]:
        arguments = ["--model", model] if model else []
        status = main([*arguments, "-m", "10", *flags])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def run_json(run, *flags: str, **kwargs) -> dict:
    status, out, err = run("--json", *flags, **kwargs)
    assert status == 0, err
    return json.loads(out)


def test_text_then_three_lines_of_mlx_lm_and_two_of_ours(run, path):
    status, out, err = run("-p", PROMPT, *DELTA)
    lines = out.splitlines()
    text = generate_text(*load(path, SMALL), PROMPT, max_tokens=10)
    assert status == 0 and lines[0] == "=" * 10 and text.splitlines()[0] in lines[1]
    starts = ("Prompt: ", "Generation: 10 tokens, ", "Peak memory: ", "Sparsity: ", "Cache: ")
    assert [line.startswith(s) for line, s in zip(lines[-5:], starts, strict=True)] == [True] * 5
    assert "prefill" in lines[-2] and "(dense: " in lines[-1]


def test_coded_keys_are_told_with_what_is_written_out_for_them(run, tmp_path):
    model = str(write_llama(tmp_path / "llama", head_dim=32))
    status, out, _ = run("-p", PROMPT, "--kv", "small", "--compare", model=model)
    assert status == 0 and "Sparsity" not in out, "nothing is held"
    cache = next(line for line in out.splitlines() if line.startswith("Cache: "))
    # Keys and values of 3 layers, 2 heads of 32, in float32, by 256 tokens.
    assert cache.endswith(
        "(dense: 0.39 MB), and 0.39 MB written out while decoding, as there is no GPU to read "
        "stored ones"
    )
    values = json.loads(run("-p", PROMPT, "--kv", "small", "--json", model=model)[1])
    assert values["scratch_bytes"] == 3 * 2 * 2 * 32 * 4 * 256 > values["cache_bytes"]


def test_quiet_prints_only_the_text(run, path):
    _, out, _ = run("-p", PROMPT, "--verbose", "False", *DELTA)
    assert out == generate_text(*load(path, SMALL), PROMPT, max_tokens=10) + "\n"


def test_json_holds_the_figures(run, path):
    values = run_json(run, "-p", PROMPT, *DELTA)
    model, tokenizer = load(path, SMALL)
    assert values["text"] == generate_text(model, tokenizer, PROMPT, max_tokens=10)
    assert values["prompt_tokens"] == len(tokenizer.encode(PROMPT))
    assert values["generation_tokens"] == 10 and values["finish_reason"] == "length"
    assert values["delta"] == {**SMALL.to_dict()}
    assert (
        0 < values["prefill_sparsity"] < values["overall_sparsity"] < values["decode_sparsity"] < 1
    )
    assert 0 < values["paper_sparsity"] < 1
    assert values["cache_bytes"] > 0 and values["dense_cache_bytes"] == 256 * 3 * 2 * 2 * 16 * 4
    assert values["prompt_tps"] > 0 < values["peak_memory_gb"]


def test_without_the_delta(run):
    values = run_json(run, "-p", PROMPT, "--no-delta")
    assert values["delta"] is None and values["prefill_sparsity"] == 0
    assert values["cache_bytes"] == values["dense_cache_bytes"]


def test_far_keys_dropped(run):
    values = run_json(run, "-p", PROMPT, "--no-delta", "--max-kv-size", "24")
    assert values["cache_bytes"] < run_json(run, "-p", PROMPT, "--no-delta")["cache_bytes"]


def test_the_papers_preset(run):
    values = run_json(run, "-p", PROMPT[:100], "--delta-paper", "--delta-threshold", "1.5")
    assert values["delta"]["threshold"] == 1.5 and values["delta"]["window"] == 0
    # What really ran: the fraction of this prompt.
    assert values["delta"]["block_size"] == round(0.05 * values["prompt_tokens"])
    assert values["prefill_sparsity"] > 0


def test_compare_shows_the_first_difference(run):
    same = run_json(run, "-p", PROMPT, "--compare", "--delta-window", "2048")
    assert same["first_difference"] is None and same["dense_text"] == same["text"]
    values = run_json(run, "-p", PROMPT, "--compare", "--delta-threshold", "5", *DELTA)
    dense = run_json(run, "-p", PROMPT, "--no-delta")
    assert values["dense_text"] == dense["text"] != values["text"]
    _, out, _ = run("-p", PROMPT, "--compare", "--delta-threshold", "5", *DELTA)
    wanted = f"Compare: differs from token {values['first_difference'] + 1} of 10 on"
    assert wanted in out and dense["text"] in out
    likeliest, ours = values["odds_there"]
    assert 0 <= ours <= likeliest <= 1 and same["odds_there"] is None
    assert f"of 10 on: there dense attention gives {likeliest:.3f} to " in out
    assert f" and {ours:.3f} to " in out


def test_a_seed_makes_sampling_repeatable(run):
    flags = ("-p", PROMPT, "--temp", "1.0", "--seed")
    assert run_json(run, *flags, "3")["text"] == run_json(run, *flags, "3")["text"]
    assert run_json(run, *flags, "3")["text"] != run_json(run, *flags, "4")["text"]


def test_prompts_come_from_a_file_or_stdin(run, tmp_path, monkeypatch):
    wanted = run_json(run, "-p", PROMPT)["text"]
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert run_json(run, "--prompt-file", str(tmp_path / "prompt.txt"))["text"] == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run_json(run, "-p", "-")["text"] == wanted


def test_the_demo_is_the_default_model(run):
    values = run_json(run, model=None)
    assert values["model"] == "demo" and values["text"].strip()


def test_a_saved_prompt_is_continued(run, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    start, end = PROMPT[:300], PROMPT[300:]
    first = run_json(run, "-p", start, "--save-prompt-cache", file, *DELTA)
    assert first["text"] == run_json(run, "-p", start, *DELTA)["text"]
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    values = run_json(run, "-p", end, "--prompt-cache-file", file, *DELTA)
    assert values["text"] == run_json(run, "-p", PROMPT, *DELTA)["text"]
    no_model = run_json(run, "-p", end, "--prompt-cache-file", file, model=None)
    assert no_model["text"] == values["text"], "the file says which model"


def test_speculative_decoding(run, path):
    values = run_json(run, "-p", PROMPT, "--draft-model", path, *DELTA)
    assert values["text"] == run_json(run, "-p", PROMPT, *DELTA)["text"]


def test_the_answer_stops_at_the_end_of_the_context(run, tmp_path):
    path = write_llama(tmp_path / "short", max_position_embeddings=40)
    status, out, err = run("--json", "-p", "night " * 34, "-m", "100", model=str(path))
    values = json.loads(out)
    assert status == 0 and values["prompt_tokens"] + values["generation_tokens"] == 40
    assert "tokens fit the model's context of 40" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "  \\n"], "the prompt is empty"),
        (["-p", "night " * 3000], "tokens but the model's context has 2048; shorten"),
        (["--prompt-file", "missing.txt"], "missing.txt"),
        (["-p", "x", "--prompt-file", "x"], "--prompt and --prompt-file are both given"),
        (["--delta-threshold", "-1"], "threshold must be >= 0 but got -1.0"),
        (["--delta-threshold", "nan"], "threshold must be >= 0 but got nan"),
        (["--delta-window", "65"], "window must be a multiple of block_size (64) but got 65"),
        (["--delta-block-size", "0"], "block_size must be >= 1 but got 0"),
        (["--max-kv-size", "64"], "max_size must be a whole number from 320"),
        (["--kv-bits", "8"], "kv_bits=8 does not go together with the delta"),
        (["--no-delta", "--delta", "sinks=2"], "--no-delta and --delta sinks contradict"),
        (["--delta", "sinks=2", "--delta-sinks", "2"], "both give sinks; drop one"),
        (["--delta", "level=1", "--delta-kl", "1"], "--delta-kl and --delta level contradict"),
        (["--no-delta", "--delta-sinks", "2"], "--no-delta and --delta-sinks contradict"),
        (["--no-delta", "--compare"], "--compare needs the delta"),
        (["--max-tokens", "0"], "--max-tokens must be positive (or -1) but got 0"),
        (["--prefill-step-size", "0"], "--prefill-step-size must be >= 1 but got 0"),
        (["--prompt-cache-file", "none.safetensors"], "no prompt cache 'none.safetensors'"),
        (["--save-prompt-cache", "no/where.safetensors"], "there is no directory no"),
        (["--save-prompt-cache", "."], "is a directory; give a file name"),
        (["--image", "x.png"], "--image is given, but the models here read text only"),
        (["--chat-template-config", "{"], None),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_misuse_gives_one_clear_line(run, flags, message):
    status, out, err = run(*flags)
    if message is None:  # the tiny model has no chat template: nothing reads the flag
        assert status == 0
        return
    assert status == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", "there is no model directory 'no-such-model'"),
        ("", "the model's name is empty"),
    ],
)
def test_an_unknown_model_gives_one_clear_line(run, model, message):
    status, _, err = run("--model", model, model=None)
    assert status == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_prompt_file_that_is_not_text(run, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    status, _, err = run("--prompt-file", str(tmp_path / "x.bin"))
    assert status == 1 and "is not UTF-8 text" in err


@pytest.mark.parametrize("content", [b"", b"\xff" * 100], ids=["empty", "garbage"])
def test_a_prompt_cache_that_is_none(run, tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    status, _, err = run("-p", "x", "--prompt-cache-file", str(file))
    assert status == 1 and "is not a prompt cache" in err and err.count("\n") == 1


def test_a_prompt_cache_of_another_model(run, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    run("-p", PROMPT, "--save-prompt-cache", file)
    status, _, err = run("-p", "x", "--prompt-cache-file", file, model="demo")
    assert status == 1 and "--model demo is not the model of the prompt cache" in err


def test_running_out_of_gpu_memory(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    monkeypatch.setattr(command, "stream_generate", fail)
    status, _, err = run("-p", "x")
    assert status == 1 and "error: out of memory" in err and "--prefill-step-size" in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_says_so_and_leaves_nothing_half_written(tmp_path, path):
    target = tmp_path / "out"
    target.mkdir()
    arguments = [sys.executable, "-m", "mlx_delta.generate", "--model", path, "-p", PROMPT]
    arguments += ["-m", "-1", "--save-prompt-cache", str(target / "cache.safetensors")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # A child of a background job would inherit SIGINT as ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun to generate
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted." in err and "Traceback" not in err
    assert {p.name for p in target.iterdir()} <= {"cache.safetensors"}
