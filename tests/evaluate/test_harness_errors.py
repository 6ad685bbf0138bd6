"""lm-evaluation-harness's tasks: what can be wrong with them, and how results are summed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra 'evaluate')")

from mlx_delta.evaluate import harness_data  # noqa: E402
from mlx_delta.evaluate.harness import (  # noqa: E402
    HarnessOptions,
    harness_tasks,
    summarize,
)
from tests.evaluate.harness_runs import run  # noqa: E402

# What can be wrong.


def test_names():
    names = harness_tasks()
    for name in ("winogrande", "squadv2", "arc_easy", "hellaswag", "piqa", "ruler", "longbench"):
        assert name in names
    with pytest.raises(ValueError, match="no task 'winogrand'.*winogrande"):
        harness_data.load_tasks("winogrand", None, {}, None)


def test_own_names(data):
    assert {"elsewhere", "small_texts"} <= set(harness_tasks(data))


def test_broken_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: '{{text}\n")
    with pytest.raises(ValueError, match="task 'mine' can't be loaded; is its YAML file"):
        harness_data.load_tasks("mine", tmp_path, {}, None)


def test_missing_data(model, tokenizer, data, monkeypatch):
    monkeypatch.setattr(harness_data, "_reachable", lambda url: False)
    with pytest.raises(FileNotFoundError) as caught:
        run(model, tokenizer, "dense", "elsewhere", data)
    message = str(caught.value)
    assert (
        "(nobody/nothing-of-this-name on the hub) could not be fetched: the hub can't be reached. "
        in message
    )
    assert f"{data}/elsewhere/validation.jsonl" in message and "train.jsonl" in message
    assert "passage, question, answer" in message and "\n" not in message


def test_expected_columns_of_functions(data):
    tasks = harness_data.load_tasks("winogrande", data, {}, None)[1]
    found = harness_data.expected_columns(tasks[0].config.to_dict(keep_callable=True))
    assert set(found) == {"sentence", "option1", "option2", "answer"}


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("validation.jsonl", '{"sentence": "A _."', r"validation.jsonl, line 1, is not valid JSON"),
        ("validation.jsonl", "\n\n", "must hold JSON objects, one for each example"),
        ("validation.json", '[{"text": "A"}]', "columns text; it reads .*sentence"),
        ("validation.parquet", "PAR1", "is not a parquet file"),
        ("train.jsonl", '{"sentence": "A _."}', "split 'validation', but .* has train only"),
    ],
)
def test_broken_data(tmp_path, file, content, message):
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande" / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        harness_data.load_tasks("winogrande", tmp_path, {}, None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 0}, "limit must be >= 1 but got 0"),
        ({"num_shots": -1}, "num_shots must be >= 0 but got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1 but got 0"),
        ({"max_seq_lengths": []}, "max_seq_lengths must be positive numbers"),
        ({"data_dir": Path("nowhere-at-all")}, "'nowhere-at-all' is no directory"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        HarnessOptions(**options)


# Summing up.


def results_of(metrics: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "results": metrics,
        "configs": {name: {"metric_list": [{"metric": "4096"}]} for name in metrics},
        "higher_is_better": {},
        "n-samples": {name: {"effective": 4} for name in metrics},
        "samples": {name: [] for name in metrics},
        **more,
    }


def test_lengths_that_were_not_measured_do_not_count():
    results = results_of({"niah": {"4096,none": -1.0, "1024,none": 0.75, "2048,none": 0.25}})
    results["samples"]["niah"] = [{"1024": 1.0}, {"1024": 0.5}]
    summary = summarize("niah", results)
    assert (summary["metric"], summary["score"], summary["low"]) == ("mean", 0.5, None)
    results = results_of({"niah": {"4096,none": -1.0, "1024,none": 0.75}})
    results["samples"]["niah"] = [{"4096": -1.0, "1024": x} for x in (1.0, 0.5, 1.0, 0.5)]
    summary = summarize("niah", results)
    assert (summary["metric"], summary["score"]) == ("1024", 0.75)
    stderr = np.std([1, 0.5, 1, 0.5], ddof=1) / 2
    assert summary["low"] == pytest.approx(0.75 - 1.96 * stderr)


def test_groups_are_averaged_unless_they_say_how():
    leaves = {
        "a": {"acc,none": 0.5, "acc_stderr,none": 0.03},
        "b": {"acc,none": 1.0, "acc_stderr,none": 0.04},
    }
    summary = summarize("both", results_of(leaves))
    assert (summary["metric"], summary["score"], summary["samples"]) == ("acc", 0.75, 8)
    assert summary["high"] == pytest.approx(0.75 + 1.96 * 0.025)
    own = {"both": {"acc,none": 0.8, "acc_stderr,none": 0.1}}
    summary = summarize("both", results_of(leaves, groups=own))
    assert (summary["score"], summary["low"]) == (0.8, pytest.approx(0.8 - 0.196))
