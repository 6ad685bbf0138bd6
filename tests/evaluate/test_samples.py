"""Tasks of samples: local files, needles and RULER's kinds of texts, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_delta import DeltaConfig
from mlx_delta.evaluate import BUNDLED_TEXT, read_text
from mlx_delta.evaluate.local_files import read_lambada, read_squad, read_winogrande
from mlx_delta.evaluate.local_tasks import ChoiceTask, CompletionTask, ReadingTask
from mlx_delta.evaluate.needles import NeedleOptions, NeedleTask, summarize_needles
from mlx_delta.evaluate.results import SUMMARIES, Results
from mlx_delta.evaluate.ruler import RULER, RulerOptions, RulerTask
from mlx_delta.evaluate.ruler_texts import PUZZLES
from mlx_delta.evaluate.table import make_tables
from mlx_delta.evaluate.tasks import Session
from mlx_delta.measure.settings import parse_setting
from tests.tiny import SMALL, llama_model

DENSE, DELTA = parse_setting("dense"), parse_setting("delta", SMALL)
PAPER = parse_setting("paper:threshold=0.5")
WINOGRANDE = [
    {"sentence": "Sarah was older than Maria so _ went first.", "option1": "Sarah",
     "option2": "Maria", "answer": "1"},
    {"sentence": "The cup did not fit the box, since the _ was far too large for it to go in, and "
     "that was the end of it.", "option1": "cup", "option2": "box", "answer": "1"},
    {"sentence": "Ann thanked Bob because _ had helped.", "option1": "Ann", "option2": "Bob",
     "answer": "2"},
]  # fmt: skip
LAMBADA = [
    {"context": "The old man looked at the sea and thought of the", "continuation": "ship"},
    {"text": "She opened the door and there stood her brother"},
]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{title} is a town by the river with {n} houses and an old mill.",
                    "qas": [
                        {"question": "How many houses?", "id": f"{n}a",
                         "answers": [{"text": str(n), "answer_start": 0}]},
                        {"question": "Who was its mayor then?", "id": f"{n}b", "answers": []},
                        {"question": "What is old?", "id": f"{n}c",
                         "answers": [{"text": "mill", "answer_start": 0}]},
                    ],
                }
            ],
        }
        for title, n in (("Aville", 90), ("Btown", 41), ("Cburg", 7))
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name, rows in (("winogrande", WINOGRANDE), ("lambada", LAMBADA)):
        lines = [json.dumps(row) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "squad").write_text(json.dumps(SQUAD))
    return {name: folder / name for name in ("winogrande", "lambada", "squad")}


def logprobs(model: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities of each token after those before it, by one dense forward."""
    logits = model(mx.array(ids[:-1])[None], cache=[KVCache() for _ in range(3)])[0]
    rows = np.array(logits, np.float64)
    return (
        rows
        - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (rows.max(-1, keepdims=True))
    )


def test_winogrande_takes_the_likelier_text(model, tokenizer, files):
    task = ChoiceTask(tokenizer, files["winogrande"], None, 4)
    records = [r for group in task.groups for r in task.measure(model, DENSE, group)]
    assert sorted(i for group in task.groups for i in group) == [0, 1, 2]
    for record in records:
        row = WINOGRANDE[record["index"]]
        before, after = row["sentence"].split("_")
        sums = []
        for option in (row["option1"], row["option2"]):
            context = tokenizer.encode(before + option)
            ids = context + tokenizer.encode(before + option + after)[len(context) :]
            found = logprobs(model, ids)
            sums.append(sum(found[i - 1, ids[i]] for i in range(len(context), len(ids))))
        assert record["score"] == int((sums[0] > sums[1]) == (row["answer"] == "1"))


def test_lambada_asks_for_the_greedy_end(model, tokenizer, files):
    task = CompletionTask(tokenizer, files["lambada"], None, 4)
    (group,) = task.groups
    for record in task.measure(model, DENSE, group):
        item = read_lambada(files["lambada"])[record["index"]]
        context, whole = (tokenizer.encode(t) for t in (item.passage, item.passage + item.end))
        found = logprobs(model, whole)
        ends = range(len(context), len(whole))
        assert record["logprob"] == pytest.approx(
            sum(found[i - 1, whole[i]] for i in ends), abs=1e-3
        )
        assert record["score"] == int(all(found[i - 1].argmax() == whole[i] for i in ends))


@pytest.mark.parametrize("setting", [DENSE, DELTA, PAPER], ids=lambda s: s.kind)
def test_answers_do_not_depend_on_batches_and_shared_paragraphs(model, tokenizer, files, setting):
    """Paragraphs that are read once, and ragged batches, give what prompts one by one give."""
    together = ReadingTask(tokenizer, files["squad"], None, 5, 6)
    alone = ReadingTask(tokenizer, files["squad"], None, 1, 6)
    assert [len(group) for group in together.groups] == [5, 4]
    records = [r for group in together.groups for r in together.measure(model, setting, group)]
    for record in records:
        (single,) = alone.measure(model, setting, [record["index"]])
        assert record["answer"] == single["answer"]
        assert record["prefill_sparsity"] == pytest.approx(single["prefill_sparsity"], abs=2e-3)
        assert (record["prefill_sparsity"] > 0) == (setting is not DENSE)


def test_questions_are_scored_by_their_words(tokenizer, files, monkeypatch):
    task = ReadingTask(tokenizer, files["squad"], None, 9)
    said = {0: "90", 1: "", 2: "the old mill", 3: "forty", 4: "Bob", 5: ""}
    cost = {"prefill": 0.0, "decode": None, "overall": 0.0, "bytes": 1}
    answers = lambda model, setting, part, batched: [(said[i], cost) for i in part]  # noqa: E731
    monkeypatch.setattr(task, "_answer", answers)
    records = task.measure(llama_model(), DENSE, list(said))
    assert [round(r["score"], 3) for r in records] == [1, 1, 0.667, 0, 0, 0]
    assert [r["exact"] for r in records] == [1, 1, 0, 0, 0, 0]
    summary = SUMMARIES["squad"](records)
    assert summary["score"] == pytest.approx((2 + 2 / 3) / 6) and summary["metric"] == "f1"
    kinds = {"answerable": pytest.approx((1 + 2 / 3) / 4), "unanswerable": 1 / 2}
    assert summary["metrics"] == {"as_dense": 0, **kinds}


def test_a_limit_spreads_samples_and_takes_whole_paragraphs(tokenizer, files):
    assert ChoiceTask(tokenizer, files["winogrande"], 2, 8).groups == [[1, 0]]
    task = ReadingTask(tokenizer, files["squad"], 5, 8)
    assert [i for group in task.groups for i in group] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_winogrande, '{"sentence": "no gap", "answer": "1"}', "line 1: a line must be"),
        (read_winogrande, "\n{broken", "line 2: a line must be"),
        (read_winogrande, "", "is empty"),
        (read_lambada, '{"text": "word"}', "line 1: .* context and continuation, or text"),
        (read_squad, "[]", "is not in SQuAD 2.0's form"),
        (read_squad, '{"data": [{"title": "x"}]}', "lacks 'paragraphs'"),
        (read_squad, '{"data": []}', "has no questions"),
    ],
)
def test_broken_files_are_named(tmp_path, read, text, message):
    file = tmp_path / "data"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(file)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "other")


# Needles.


@pytest.fixture(scope="module")
def needles(tokenizer) -> NeedleTask:
    options = NeedleOptions(lengths=(300, 500), depths=(0.2, 0.5, 0.9), texts=2)
    return NeedleTask(tokenizer, read_text(BUNDLED_TEXT), options)


def test_needles_stand_at_their_depths_and_are_asked_for(needles, tokenizer):
    for index in range(4):
        haystack, length = needles.haystack(index), (300, 300, 500, 500)[index]
        ends = [len(haystack.ids) + len(q) + len(a) for _, q, a in haystack.questions]
        assert max(ends) == length
        for depth, question, answer in haystack.questions:
            number = tokenizer.decode(answer).strip()
            place = re.search(r"number for (\w+) is:$", tokenizer.decode(question))[1]
            told = f"The special magic number for {place} is: {number}."
            assert tokenizer.decode(haystack.ids).count(told) == 1
            before = len(tokenizer.encode(tokenizer.decode(haystack.ids).split(told)[0]))
            assert before / len(haystack.ids) == pytest.approx(depth, abs=0.1)
    assert needles.haystack(0).ids != needles.haystack(1).ids


def test_a_needle_is_found_where_each_token_ranks_first(needles, model):
    (record,) = needles.measure(model, DENSE, [0])
    haystack = needles.haystack(0)
    for depth, question, answer in haystack.questions:
        found = logprobs(model, haystack.ids + question + answer)
        start = len(haystack.ids) + len(question)
        found = found[start - 1 : start - 1 + len(answer)]
        assert record["right"][str(depth)] == (found.argmax(-1).tolist() == answer)
        told = found[np.arange(len(answer)), answer]
        assert record["nats"][str(depth)] == pytest.approx(-told.sum(), rel=1e-3)
        found[np.arange(len(answer)), answer] = -np.inf
        leads = told - found.max(axis=-1)
        assert record["margins"][str(depth)] == pytest.approx(min(leads), abs=1e-3)
    (ours,) = needles.measure(model, DELTA, [0])
    assert list(ours["right"]) == ["0.2", "0.5", "0.9"] and ours["prefill_sparsity"] > 0.2


def test_needles_are_counted_by_length_and_depth():
    cost = {"prefill_sparsity": 0.0, "decode_sparsity": 0.0, "overall_sparsity": 0.0,
            "prefill_heads": [], "cache_bytes": 4}  # fmt: skip
    records = [
        {"index": 0, "length": 64, "right": {"0.5": True, "0.9": False}, **cost},
        {"index": 1, "length": 64, "right": {"0.5": True, "0.9": True}, **cost},
        {"index": 2, "length": 99, "right": {}},
    ]
    summary = summarize_needles(records)
    assert summary["score"] == 0.75
    assert summary["metrics"] == {
        "found": 3, "asked": 4, "found@64:0.5": 2, "asked@64:0.5": 2,
        "found@64:0.9": 1, "asked@64:0.9": 2,
    }  # fmt: skip


class Chatting:
    """A tokenizer with a chat template, as mlx-lm wraps one."""

    has_chat_template = True

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return f"[user] {messages[0]['content']} [model] "


def test_the_chat_template_is_around_text_and_question(tokenizer):
    options = NeedleOptions(lengths=(200,), depths=(0.5,), texts=1)
    task = NeedleTask(Chatting(tokenizer), read_text(BUNDLED_TEXT), options)
    haystack = task.haystack(0)
    ((_, question, _),) = haystack.questions
    assert tokenizer.decode(haystack.ids).startswith("[user] ")
    assert re.search(r"number for \w+\? \[model\] The special", tokenizer.decode(question))
    plain = NeedleTask(
        Chatting(tokenizer), read_text(BUNDLED_TEXT), dataclasses.replace(options, chat=False)
    )
    assert "[user]" not in tokenizer.decode(plain.haystack(0).ids)
    puzzle = RulerTask("ruler-vt", Chatting(tokenizer), RulerOptions(lengths=(400,), samples=1))
    prompt = tokenizer.decode(puzzle._prompt(puzzle.puzzle(0)))
    assert prompt.startswith("[user] ") and "[model] The 5 variables" in prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (0.5, 1.2)}, r"depths must differ and be in \[0, 1\]"),
        ({"texts": 0}, "texts >= 1"),
        ({"lengths": (0,)}, "lengths must be positive"),
        ({"lengths": (9000,)}, "longer than the model's context of 2048"),
    ],
)
def test_needle_options_out_of_range_are_named(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        NeedleTask(tokenizer, "prose " * 99, NeedleOptions(**changes), 2048)


def test_needles_that_do_not_fit_are_named(tokenizer):
    options = NeedleOptions(lengths=(120,), depths=(0.1, 0.2, 0.3, 0.4))
    with pytest.raises(ValueError, match="4 needles do not fit into 120 tokens"):
        NeedleTask(tokenizer, read_text(BUNDLED_TEXT), options).haystack(0)


# RULER.


@pytest.mark.parametrize("name", RULER)
def test_a_text_fills_its_length_and_holds_the_answers(tokenizer, name):
    length = 1300
    task = RulerTask(name, tokenizer, RulerOptions(lengths=(length,), samples=3))
    puzzles = [task.puzzle(i) for i in range(2)]
    assert puzzles[0] == task.puzzle(0) != puzzles[1]
    for puzzle in puzzles:
        used = len(task._prompt(puzzle)) + puzzle.tokens
        assert 0.75 * length < used <= length
        assert all(answer in puzzle.text for answer in puzzle.answers)
        assert not any(answer in puzzle.question + puzzle.begun for answer in puzzle.answers)


def test_common_and_frequent_words_are_the_most_frequent():
    for kind, least in (("cwe", 10), ("fwe", 60)):
        puzzle = PUZZLES[kind][0](np.random.default_rng(1), 3 * least)
        listed = re.findall(r"[a-z]{6}", puzzle.text.partition("\n")[2])
        counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
        n = len(puzzle.answers)
        assert {word for _, word in counts[:n]} == set(puzzle.answers)
        assert counts[n - 1][0] > counts[n][0]


def test_variables_hand_the_number_on():
    puzzle = PUZZLES["vt"][0](np.random.default_rng(1), 20)
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", puzzle.text):
        values[name] = values.get(value, value)
    number = re.search(r"value (\d+)", puzzle.question)[1]
    assert sorted(values) == sorted(puzzle.answers) and set(values.values()) == {number}


def test_ruler_counts_the_answers_that_were_given(tokenizer, model):
    task = RulerTask("ruler-vt", tokenizer, RulerOptions(lengths=(400,), samples=2))
    records = task.measure(model, DELTA, [0, 1])
    for record in records:
        answers = task.puzzle(record["index"]).answers
        said = record["answer"].lower()
        assert record["score"] == sum(a.lower() in said for a in answers) / 5
    summary = SUMMARIES["ruler-vt"]([{**records[0], "score": 0.4}, {**records[1], "score": 0.8}])
    assert summary["score"] == pytest.approx(0.6)
    assert summary["metrics"]["share@400"] == pytest.approx(0.6)


def test_a_length_too_short_is_named(tokenizer):
    with pytest.raises(ValueError, match="the smallest text of cwe takes .* tokens"):
        RulerTask("ruler-cwe", tokenizer, RulerOptions(lengths=(64,))).puzzle(0)


# Sessions.


def session(model, tokenizer, settings) -> Session:
    return Session(model, tokenizer, settings, Results({"name": "m", "fingerprint": ""}, None))


def test_what_can_not_differ_from_dense_is_taken_over_and_checked(
    model, tokenizer, files, monkeypatch
):
    """Texts of a few tokens: the delta has a window of 24, and skips nothing."""
    wide = parse_setting("delta", DeltaConfig(block_size=8, window=64, sinks=3, threshold=1.0))
    assert (wide.dense_up_to, DENSE.dense_up_to, PAPER.dense_up_to) == (72, 0, 0)
    coded = parse_setting("delta:key_format=codes,key_bits=4", SMALL)
    assert (DELTA.dense_up_to, coded.dense_up_to) == (24, 0)
    measured = []
    task = ChoiceTask(tokenizer, files["winogrande"], None, 8)
    original = task.measure

    def measure(model, setting, group):
        measured.append((setting.kind, sorted(group)))
        return original(model, setting, group)

    monkeypatch.setattr(task, "measure", measure)
    one = session(model, tokenizer, [DENSE, wide])
    one.samples(task)()
    assert measured == [("dense", [0, 1, 2]), ("delta", [0])], "number 0 is checked"
    dense, ours = one.results.data["runs"]
    assert ours["checked"] == {"samples": 1, "differing": 0}
    by_index = {r["index"]: r for r in ours["records"]}
    assert [by_index[i].get("as_dense", False) for i in range(3)] == [False, True, True]
    one.results.save(force=True)
    assert ours["summary"]["score"] == dense["summary"]["score"]
    assert ours["summary"]["metrics"] == {"as_dense": 2}


def test_where_a_check_differs_all_is_measured(model, tokenizer, files, monkeypatch):
    wide = parse_setting("delta", DeltaConfig(block_size=8, window=64, sinks=3, threshold=1.0))
    task = ChoiceTask(tokenizer, files["winogrande"], None, 8)
    one = session(model, tokenizer, [DENSE, wide])
    dense_run = one.results.run("winogrande", DENSE, task.options, 3)
    figures = dict.fromkeys(("prefill_sparsity", "decode_sparsity", "overall_sparsity"), 0.0)
    figures["cache_bytes"] = 1
    dense_run["records"] += [{"index": i, "score": 7, **figures} for i in range(3)]
    one.samples(task)()
    ours = one.results.data["runs"][1]
    assert ours["checked"]["differing"] == 1 and len(ours["records"]) == 3
    assert not any(record.get("as_dense") for record in ours["records"])


def test_tables_of_samples(model, tokenizer, files, needles):
    one = session(model, tokenizer, [DENSE, DELTA])
    one.samples(CompletionTask(tokenizer, files["lambada"], None, 4))()
    one.samples(needles)()
    one.results.save(force=True)
    lambada, found = make_tables(one.results.data)
    assert lambada.caption == "lambada, m: 2 samples of lambada"
    assert [row[0] for row in lambada.rows] == ["dense", "delta"]
    assert "4 texts of 300 and 500 tokens with needles at depths 0.2, 0.5 and 0.9" in found.caption
    assert found.rows[0][1] == "0 of 12" and found.header[2] == "of dense's"
    for run, nats in zip(one.results.data["runs"][2:], (2.0, 2.5), strict=True):
        record = {"right": {"0.5": True}, "nats": {"0.5": nats}}
        run["records"] = [record | {"index": i, "margins": {"0.5": 0.09 + i / 100}} for i in (0, 1)]
        if nats > 2:
            run["records"][1]["nats"] = {"0.5": nats + 0.1}
    kept = make_tables(one.results.data)[1].rows[1][2]
    assert kept.startswith("1.000 (2 of 2; clear ones 1 of 1), +0.550 ±")
