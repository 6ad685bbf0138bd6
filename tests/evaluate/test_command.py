"""The command line: resuming, adding, refusing, printing; on a small random model."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_delta.evaluate import BUNDLED_TEXT, local_tasks, read_text, tasks
from mlx_delta.evaluate.command import main
from tests.tiny import LLAMA, write_llama

RECALL = "--tasks recall --length 256 --distances 100 150 --answers 2 --facts 3".split()
LANGUAGE = "--tasks perplexity kld --length 128 --windows 3".split()
SETTINGS = ["--settings", "dense", "delta:block_size=8,window=16", "window-only"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("model"), head_dim=64))


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """The beginning of the bundled text, quicker to encode."""
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(read_text(BUNDLED_TEXT)[:6000], encoding="utf-8")
    return file


@pytest.fixture
def evaluate(model, text, capsys):
    """Runs the command on the model; what it returned and printed."""

    def run(*flags: str | Path, model: str | None = model) -> Outcome:
        chosen = ["--model", model, "--text", str(text)] if model else []
        status = main([*chosen, *map(str, flags)])
        return Outcome(status, *capsys.readouterr())

    return run


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


class Counter:
    """Counts calls of a function in ``tasks``, and interrupts one of them."""

    def __init__(self, monkeypatch, name: str, interrupt_at: int | None = None):
        self.calls: list[tuple] = []
        function = getattr(tasks, name)

        def counted(*args):
            if len(self.calls) == interrupt_at:
                raise KeyboardInterrupt
            self.calls.append(args)
            return function(*args)

        monkeypatch.setattr(tasks, name, counted)


def test_the_file_holds_what_readers_expect(evaluate, tmp_path):
    file = tmp_path / "results.json"
    flags = ["--settings", "dense", "delta:threshold=0.5", "kv8", "--output", file]
    assert evaluate(*RECALL, *flags).status == 0
    data = read(file)
    assert data["version"] == 1 and set(data["machine"]) == {"platform", "device", "mlx", "mlx_lm"}
    assert [run["setting"] for run in data["runs"]] == ["dense", "delta:threshold=0.5", "kv8"]
    assert [run["kind"] for run in data["runs"]] == ["dense", "delta", "kv8"]
    run = data["runs"][1]
    assert run["task"] == "recall" and run["delta"]["threshold"] == 0.5
    assert run["options"]["distances"] == [100, 150] and run["options"]["length"] == 256
    assert len(run["records"]) == run["planned"] == run["summary"]["samples"] == 4
    summary = run["summary"]
    assert summary["low"] <= summary["score"] <= summary["high"]
    assert len(summary["prefill_heads"]) == 3 and summary["cache_bytes"] > 0
    assert summary["metric"] == "accuracy" and summary["higher_is_better"] is True


@pytest.mark.parametrize(
    ("flags", "function", "interrupt_at", "total"),
    [(RECALL, "measure_sample", 6, 12), (LANGUAGE, "measure_window", 2, 3)],
)
def test_an_interrupted_run_goes_on_where_it_was(
    evaluate, tmp_path, monkeypatch, flags, function, interrupt_at, total
):
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    table = evaluate(*flags, *SETTINGS, "--output", whole).out
    with monkeypatch.context() as patch:
        Counter(patch, function, interrupt_at)
        outcome = evaluate(*flags, *SETTINGS, "--output", cut)
    assert outcome.status == 130
    assert outcome.err.endswith("Interrupted; run the same command again to go on.\n")
    shown = evaluate("--show", cut, model=None)
    assert shown.status == 0 and "(2 of " in shown.out
    assert 0 < sum(len(run["records"]) for run in read(cut)["runs"])
    with monkeypatch.context() as patch:
        counter = Counter(patch, function)
        again = evaluate(*flags, *SETTINGS, "--output", cut)
    assert len(counter.calls) == total - interrupt_at
    assert read(cut) == read(whole)
    assert again.out == table
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_finished_work_is_not_done_again(evaluate, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    evaluate(*LANGUAGE, *SETTINGS, "--output", file)
    before = read(file)
    counter = Counter(monkeypatch, "measure_window")
    evaluate(*LANGUAGE, *SETTINGS, "--output", file)
    assert not counter.calls and read(file) == before


def test_settings_and_tasks_are_added(evaluate, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    evaluate(*LANGUAGE[:2], *LANGUAGE[3:], "--settings", "dense", "kv8", "--output", file)
    before = read(file)
    counter = Counter(monkeypatch, "measure_window")
    evaluate(*LANGUAGE, "--settings", "kv8", "delta", "--output", file)
    assert [call[4] for call in counter.calls] == [True] * 3
    after = read(file)
    assert after["runs"][:2] == before["runs"]
    assert [(run["task"], run["setting"]) for run in after["runs"]] == [
        ("perplexity", "dense"),
        ("perplexity", "kv8"),
        ("perplexity", "delta"),
        ("kld", "kv8"),
        ("kld", "delta"),
    ]
    assert all(len(run["records"]) == 3 for run in after["runs"])


def test_samples_go_on_where_they_were(evaluate, tmp_path, monkeypatch):
    lines = [{"text": f"He saw the {word} and then the {word}"} for word in ("sea", "moor", "dog")]
    data, file = tmp_path / "lambada.jsonl", tmp_path / "results.json"
    data.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--tasks", f"lambada={data}", "needles", "fidelity", "--lengths", "300", "--samples"]
    flags += ["1", "--depths", "0.5", "--windows", "1", "--batch-size", "1", "--output", file]
    assert evaluate(*flags, "--settings", "dense").status == 0
    before = read(file)
    scored: list[Any] = []
    original = local_tasks.score_pairs

    def score_pairs(model, setting, pairs, batch_size):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(setting.name)
        return original(model, setting, pairs, batch_size)

    monkeypatch.setattr(local_tasks, "score_pairs", score_pairs)
    flags += ["--settings", "dense", "kv8", "paper"]
    assert evaluate(*flags).status == 130
    monkeypatch.setattr(local_tasks, "score_pairs", original)
    outcome = evaluate(*flags)
    assert outcome.status == 0 and "lambada, " in outcome.out and "99 %" in outcome.out
    after = read(file)
    assert scored == ["kv8"] and after["runs"][0]["records"] == before["runs"][0]["records"]
    tasks_done = {(run["task"], run["setting"]): len(run["records"]) for run in after["runs"]}
    assert tasks_done == {
        (task, name): count
        for task, count in (("lambada", 3), ("needles", 1), ("fidelity", 1))
        for name in ("dense", "kv8", "paper")
    }


def test_another_models_results_are_refused_and_kept(evaluate, tmp_path):
    file = tmp_path / "results.json"
    evaluate(*LANGUAGE, "--settings", "dense", "--output", file)
    before = file.read_bytes()
    other = write_llama(tmp_path / "other", head_dim=64, seed=1)
    outcome = evaluate(*LANGUAGE, "--settings", "dense", "--output", file, model=str(other))
    assert outcome.status == 1 and "holds results of another model" in outcome.err
    assert "--restart" in outcome.err and file.read_bytes() == before
    flags = ["--settings", "dense", "--output", file, "--restart"]
    assert evaluate(*LANGUAGE, *flags, model=str(other)).status == 0
    assert read(file)["model"]["name"] == str(other)


def test_other_options_are_refused_and_the_results_kept(evaluate, tmp_path):
    file = tmp_path / "results.json"
    evaluate(*LANGUAGE, "--settings", "dense", "--output", file)
    before = file.read_bytes()
    changed = [flag.replace("128", "100") for flag in LANGUAGE]
    outcome = evaluate(*changed, "--settings", "dense", "kv8", "--output", file)
    assert outcome.status == 1 and file.read_bytes() == before
    assert "perplexity with length=128 but length is 100 now" in outcome.err


def test_everything_is_checked_before_anything_is_measured(evaluate, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    evaluate(*LANGUAGE, "--settings", "dense", "--output", file)
    counter = Counter(monkeypatch, "measure_sample")
    flags = ["--tasks", "recall", "kld", "--length", "300", "--distances", "100"]
    outcome = evaluate(*flags, "--settings", "dense", "--output", file)
    assert outcome.status == 1 and "kld with length=128 but length is 300" in outcome.err
    assert not counter.calls


def test_a_setting_that_has_come_to_mean_something_else_is_refused(evaluate, tmp_path):
    file = tmp_path / "results.json"
    evaluate(*LANGUAGE, "--settings", "delta", "--output", file)
    data = read(file)
    data["runs"][0]["delta"]["sinks"] = 9
    file.write_text(json.dumps(data))
    outcome = evaluate(*LANGUAGE, "--settings", "delta", "--output", file)
    assert outcome.status == 1
    assert "'delta' with sinks=9 but sinks is 4 now" in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "kld", "kld"], r"task 'kld' is given twice"),
        (["--settings", "dnse"], r"unknown setting 'dnse' (did you mean dense"),
        (["--settings", "dense", "dense"], r"'dense' is given twice"),
        (["--text", "nowhere.txt"], r"there is no text file 'nowhere.txt'"),
        (["--output", "no/such/folder.json"], r"can't write a file 'no/such/folder.json'"),
        (["--model", "nowhere"], r"there is no model directory 'nowhere'"),
        (["--tasks", "kld", "--length", "4096"], r"longer than the model's context of 2048"),
        (["--tasks", "recall", "--distances", "9000"], r"a distance of 9000 needs samples of"),
        (["--show", "nowhere.json"], r"there is no results file 'nowhere.json'"),
        (["--tasks", "needles=x"], r"task 'needles' takes no file; those that do are winogrande"),
        (["--tasks", "squad=nowhere"], r"'squad=nowhere': there is no file 'nowhere'"),
        (["--tasks", "squad=a", "squad=b"], r"there is no file 'a'"),
        (["--tasks", "needles", "--lengths", "4096"], r"longer than the model's context of 2048"),
        (["--settings", "delta:sparsity=0.7"], r"sparsity needs a calibrated model"),
        (["--settings", "delta:sparsity=x"], r"sparsity must be a number but got 'x'"),
        (["--settings", "delta:sparsity=0.7,kl=1"], r"sparsity and kl both set the level"),
    ],
)
def test_misuse_is_one_line(evaluate, flags, message):
    outcome = evaluate(*flags)
    assert outcome.status == 1 and outcome.err.count("\n") <= 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_where_results_could_not_be_kept_nothing_is_measured(evaluate, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "no" / "results.json")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link.json", "pipe"):
        outcome = evaluate(*LANGUAGE, "--output", tmp_path / name)
        assert outcome.status == 1 and f"can't write a file '{tmp_path / name}'" in outcome.err
        assert not outcome.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a results file"),
        ("[]", "is not a results file"),
        ('{"version": 1}', "is not a results file"),
        ('{"version": 2, "runs": [], "model": {"fingerprint": ""}}', "has version 2"),
    ],
)
def test_what_is_no_results_file_is_refused_and_kept(evaluate, tmp_path, content, message):
    file = tmp_path / "results.json"
    file.write_text(content)
    outcome = evaluate(*LANGUAGE, "--output", file)
    assert outcome.status == 1 and message in outcome.err and file.read_text() == content


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00night"])
def test_an_unreadable_text_is_named(evaluate, tmp_path, content):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    outcome = evaluate(*LANGUAGE, "--text", file)
    assert outcome.status == 1 and str(file) in outcome.err


def test_a_short_text_is_named_with_tokens_and_window(evaluate, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was a dark night. " * 9)
    outcome = evaluate("--tasks", "kld", "--text", file)
    assert outcome.status == 1
    assert "tokens but a window takes 2049; give a longer --text" in outcome.err


def test_a_model_without_keys_to_hold_has_dense_settings_only(evaluate, tmp_path):
    path = write_llama(tmp_path / "latent", head_dim=64)
    config = {**LLAMA, "head_dim": 64, "model_type": "deepseek_v3"}
    (path / "config.json").write_text(json.dumps(config))
    outcome = evaluate("--settings", "dense", "delta", model=str(path))
    assert outcome.status == 1
    assert "setting 'delta' needs a delta model" in outcome.err
    assert (
        "Settings without it are dense, kv8, kv4, kv4-rotated, kivi4, kivi2 and rotating:N"
        in outcome.err
    )


def test_tables_say_the_same_in_markdown(evaluate, tmp_path):
    file = tmp_path / "results.json"
    plain = evaluate(*RECALL, *SETTINGS, "kv8", "--output", file).out
    shown = evaluate("--show", file, model=None).out
    markdown = evaluate("--show", file, "--markdown", model=None).out
    assert shown == plain
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:5] == ["setting", "accuracy", "vs dense", "@100", "@150"]
    assert len(cells) == 6 and {len(row) for row in cells} == {10}
    text_rows = plain.splitlines()[2:]
    for row, line in zip(cells[2:], text_rows, strict=True):
        assert "".join(row) == line.replace("  ", "").strip() or all(c in line for c in row)
    runs = read(file)["runs"]
    for row, run in zip(cells[2:], runs, strict=True):
        assert row[0] == run["setting"]
        assert row[1].startswith(f"{run['summary']['score']:.3f} ±")
        share = run["summary"]["cache_bytes"] / runs[0]["summary"]["cache_bytes"]
        assert row[-1] == f"{share:.3f}"
    assert cells[2][5] == "–" and cells[3][5] == f"{runs[1]['summary']['prefill_sparsity']:.3f}"


def test_without_the_harness_its_tasks_are_named_with_how_to_install_it(evaluate, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    near = evaluate("--tasks", "recal").err
    assert "unknown task 'recal' (did you mean recall?)" in near
    outcome = evaluate("--tasks", "winogrande")
    assert outcome.status == 1
    assert "unknown task 'winogrande'" in outcome.err
    assert "pip install 'mlx_delta[evaluate]'" in outcome.err


@dataclass(frozen=True)
class FakeOptions:
    limit: int | None
    num_shots: int | None
    data_dir: Path | None
    batch_size: int
    max_gen_toks: int | None
    apply_chat_template: bool
    seed: int
    max_seq_lengths: list[int] | None


def test_the_harness_resumes_from_the_answers_it_kept(evaluate, tmp_path, monkeypatch):
    asked: list[str] = []
    stop_at = ["q2"]

    def run_harness(model, tokenizer, setting, task, options, done, save):
        for question in ("q1", "q2", "q3"):
            if question in done:
                continue
            if question in stop_at:
                raise KeyboardInterrupt
            asked.append(f"{setting.name} {question}")
            done[question] = 1.0
            save()
        figures = dict.fromkeys(("prefill_sparsity", "decode_sparsity", "overall_sparsity"), 0.5)
        summary = {"score": 0.75, "low": 0.5, "high": 0.9, "metric": "acc", "samples": 3}
        return {"results": {task: 1}, "summary": summary | figures | {"cache_bytes": 1000}}

    fake = ModuleType("mlx_delta.evaluate.harness")
    fake.HarnessOptions = FakeOptions
    fake.harness_tasks = lambda data_dir: ["winogrande", "squadv2"]
    fake.run_harness = run_harness
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    file = tmp_path / "results.json"
    flags = ["--tasks", "winogrande", "--settings", "dense", "delta", "--output", file]
    assert evaluate(*flags).status == 130
    stop_at.clear()
    outcome = evaluate(*flags, "--batch-size", "1")
    assert outcome.status == 0 and "0.750 ±0.250" in outcome.out
    assert asked == ["dense q1", "dense q2", "dense q3", "delta q1", "delta q2", "delta q3"]
    runs = read(file)["runs"]
    assert [run["harness"] for run in runs] == [{"results": {"winogrande": 1}}] * 2
    assert not any("done" in run for run in runs)
    assert "limit is 5 now" in evaluate(*flags, "--limit", "5").err
    near = evaluate("--tasks", "winogrand").err
    assert "unknown task 'winogrand' (did you mean winogrande?)" in near
