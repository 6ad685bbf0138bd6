"""Recall samples: exact distances with any tokenizer; and what counts as right."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.evaluate import (
    BUNDLED_TEXT,
    RecallOptions,
    RecallTask,
    measure_sample,
    read_text,
    summarize_recall,
)
from mlx_delta.evaluate.command import main
from mlx_delta.evaluate.recall import FACTS
from mlx_delta.evaluate.results import read_results
from mlx_delta.measure.settings import parse_setting

from . import tokenizers

TEXT = read_text(BUNDLED_TEXT)
SHORT = RecallOptions(seed=3, answers=3, distances=(200, 333), length=640, facts=6)


@pytest.fixture(scope="module", params=list(tokenizers.ALL))
def tokenizer(request):
    return tokenizers.ALL[request.param]()


def test_each_value_was_told_exactly_its_distance_before(tokenizer):
    task = RecallTask(tokenizer, TEXT, SHORT)
    for template, index in task.samples:
        sample = task.sample(template, index)
        assert len(sample.ids) == 640
        assert sorted(q.distance for q in sample.questions) == [200, 333]
        for question in sample.questions:
            answer = slice(question.start, question.start + question.tokens)
            told = slice(answer.start - question.distance, answer.stop - question.distance)
            assert sample.ids[told] == sample.ids[answer]
            assert told.stop <= sample.prefix < answer.start
            words = tokenizer.decode(sample.ids[answer]).split()
            before = tokenizer.decode(sample.ids[told.start - 60 : told.stop])
            asked = tokenizer.decode(sample.ids[sample.prefix : answer.stop])
            form = r"the name is (\w+)" if template == "direct" else r"the password of (\w+) is"
            (name,) = re.findall(f"Remember: {form} {' '.join(words)}$", before)
            asked_form = form.replace(r"(\w+)", name).replace("the", "The", 1)
            assert asked.endswith(f"{asked_form} {' '.join(words)}")
            # Told once, asked once: nothing else gives the answer away.
            assert tokenizer.decode(sample.ids).count(f" {' '.join(words)}.") == 2


def test_the_tail_begins_with_the_first_question_and_ends_with_the_last_answer(tokenizer):
    sample = RecallTask(tokenizer, TEXT, SHORT).sample("direct", 0)
    assert tokenizer.decode(sample.ids[sample.prefix :]).strip().startswith("The name is")
    last = max(sample.questions, key=lambda q: q.start)
    assert len(sample.ids) - (last.start + last.tokens) == 1


def test_a_text_begins_with_bos_where_the_tokenizer_says_so(tokenizer):
    sample = RecallTask(tokenizer, TEXT, SHORT).sample("direct", 0)
    bos = tokenizer.encode("a")[0] == tokenizer.bos_token_id
    assert (sample.ids[0] == tokenizer.bos_token_id) == bos
    assert tokenizer.bos_token_id not in sample.ids[1:]


def test_samples_depend_on_seed_template_and_index_only(tokenizer):
    task = RecallTask(tokenizer, TEXT, SHORT)
    more = RecallTask(tokenizer, TEXT, dataclasses.replace(SHORT, answers=9))
    other = RecallTask(tokenizer, TEXT, dataclasses.replace(SHORT, seed=4))
    assert task.sample("password", 2) == more.sample("password", 2)
    different = {tuple(task.sample(*sample).ids) for sample in task.samples}
    assert len(different) == len(task.samples) == 6
    assert tuple(other.sample("password", 2).ids) not in different


def test_facts_stand_whole_and_between_them_runs_the_prose():
    tokenizer = tokenizers.demo()
    sample = RecallTask(tokenizer, TEXT, SHORT).sample("password", 1)
    text = tokenizer.decode(sample.ids[: sample.prefix])
    fact = r"\n\nRemember: the password of \w+ is \w+ \w+\."
    assert len(re.findall(fact, text)) == 6
    assert re.sub(fact, "", text) in TEXT


def test_the_demo_model_is_asked_in_the_tokens_it_was_trained_on():
    tokenizer = tokenizers.demo()
    sample = RecallTask(tokenizer, TEXT, SHORT).sample("password", 1)
    question = sample.questions[0]
    assert question.tokens == 2
    text = tokenizer.decode(sample.ids[sample.prefix : question.start + 3])
    asked, words = text[: text.index(" is ") + 3], text[text.index(" is ") + 3 :]
    trained = [tokenizer.encode(part, add_special_tokens=False) for part in (asked, words)]
    assert sum(trained, []) == sample.ids[sample.prefix : question.start + 3]


@pytest.mark.parametrize(
    ("context", "options", "length", "distances", "facts"),
    [
        (2048, {}, 2048, (256, 512, 1024, 1900), 18),
        (131072, {}, 2048, (256, 512, 1024, 1900), 18),
        (None, {}, 2048, (256, 512, 1024, 1900), 18),
        (1000, {}, 1000, (256, 512), 8),
        (4096, {"distances": (3000,)}, 3026, (3000,), 27),
        (4096, {"length": 600}, 600, (256, 512), 5),
        (512, {"facts": 2}, 512, (256,), 2),
    ],
)
def test_what_is_chosen_fits_the_context(context, options, length, distances, facts):
    task = RecallTask(tokenizers.demo(), TEXT, RecallOptions(**options), context)
    assert (task.length, task.distances, task.facts) == (length, distances, facts)
    task.sample("direct", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"seed must be >= 0 but got -1"),
        ({"answers": 0}, r"answers must be >= 1 but got 0"),
        ({"facts": 61}, r"facts must be at most 60, one per name, but got 61"),
        ({"facts": 3}, r"facts must be at least one per distance \(4\) but got 3"),
        ({"templates": ("direkt",)}, r"templates must be some of direct, .* but got 'direkt'"),
        ({"distances": (300, 300)}, r"distances must differ but got 300 300"),
        ({"distances": (2040,)}, r"distance of 2040 needs samples of \d+ tokens .* have 2048"),
        ({"distances": (5,)}, r"distance of 5 is too short: with 1 questions .* least \d+"),
        ({"length": 200}, r"200 tokens are too short for any of the distances 256, 512"),
        ({"length": 4096}, r"sample of 4096 tokens is longer than the model's context of 2048"),
        ({"length": 400, "facts": 60}, r"60 facts with distances 256 don't fit into 400 tokens"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=r"\[recall\] .*" + message):
        RecallTask(tokenizers.demo(), TEXT, RecallOptions(**options), 2048).sample("direct", 0)


def test_a_short_text_is_named_with_its_tokens():
    with pytest.raises(ValueError, match=r"the text has 4 tokens but a sample takes 2048"):
        RecallTask(tokenizers.demo(), "It was a night", RecallOptions(), 2048)


class Oracle:
    """A model that ranks the true next token first, but for chosen positions."""

    def __init__(self, ids: list[int], wrong: list[int]):
        self.layers = [SimpleNamespace()]
        self.best = np.array([*ids[1:], 0])
        self.best[[position - 1 for position in wrong]] = 0

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        start, n = cache[0].offset, tokens.shape[1]
        cache[0].update_and_fetch(mx.zeros((1, 1, n, 4)), mx.zeros((1, 1, n, 4)))
        best = mx.array(self.best[start : start + n])
        return (mx.arange(4096) == best[:, None]).astype(mx.float32)[None]


@pytest.mark.parametrize("make", [tokenizers.demo, tokenizers.byte_pairs])
def test_an_answer_is_right_when_all_of_its_tokens_are_ranked_first(make):
    task = RecallTask(make(), TEXT, SHORT)
    sample = task.sample("direct", 0)
    first, second = sample.questions
    for wrong, expected in (
        ([], (True, True)),
        ([first.start], (False, True)),
        ([second.start + second.tokens - 1], (True, False)),
        ([first.start - 1, first.start + first.tokens, second.start - 1], (True, True)),
    ):
        model = Oracle(sample.ids, wrong)
        record = measure_sample(model, parse_setting("dense"), task, "direct", 0)
        assert record["right"] == {
            str(question.distance): right
            for question, right in sorted(
                zip((first, second), expected, strict=True), key=lambda pair: pair[0].distance
            )
        }


def test_a_summary_counts_per_distance_and_template():
    figures = {
        "prefill_sparsity": 0.5,
        "decode_sparsity": 0.25,
        "overall_sparsity": 0.4,
        "prefill_heads": [[0.5, 0.25]],
        "cache_bytes": 100,
    }
    records = [
        {"template": "direct", "index": 0, "right": {"200": True, "333": False}, **figures},
        {"template": "direct", "index": 1, "right": {"200": True, "333": True}, **figures},
        {
            "template": "password",
            "index": 0,
            "right": {"200": True, "333": False},
            **figures,
            "prefill_heads": [[0.2, 0.25]],
            "cache_bytes": 400,
        },
    ]
    summary = summarize_recall(records)
    assert summary["score"] == 4 / 6 and summary["samples"] == 3
    assert summary["metrics"]["accuracy@200"] == 1 and summary["metrics"]["high@200"] == 1
    assert summary["metrics"]["accuracy@333"] == pytest.approx(1 / 3)
    assert summary["metrics"]["accuracy:direct"] == 3 / 4
    assert summary["prefill_heads"] == [[0.4, 0.25]] and summary["cache_bytes"] == 200
    # Wilson's interval of 4 of 6, from its defining quadratic.
    p, n, z2 = 4 / 6, 6, 1.959963984540054**2
    roots = np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p])
    assert [summary["low"], summary["high"]] == pytest.approx(sorted(roots))


def test_the_demo_model_remembers_and_does_not_without_the_far_keys(tmp_path):
    file = tmp_path / "results.json"
    flags = "--tasks recall --length 400 --distances 280 --answers 1 --facts 3".split()
    settings = ["delta:key_bits=4,value_bits=4", "window-only"]
    assert main([*flags, "--settings", *settings, "--output", str(file)]) == 0
    delta, dropped = (run["summary"] for run in read_results(file)["runs"])
    assert delta["score"] == 1 and dropped["score"] == 0
    assert dropped["prefill_sparsity"] > delta["prefill_sparsity"] > 0.2


TRAINER = Path(__file__).parents[2] / "examples" / "train_demo" / "recall.py"


@pytest.mark.skipif(not TRAINER.is_file(), reason="the examples are not here")
def test_the_demo_models_trainer_reads_the_same_words_and_needs_numpy_only():
    code = (
        "import sys; sys.modules.update(mlx=None, mlx_delta=None); import recall; "
        "print(*recall.NAMES, *recall.WORDS, *recall.TEMPLATES)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=TRAINER.parent, capture_output=True, text=True
    )
    expected = [*FACTS["names"], *FACTS["words"], *FACTS["templates"]]
    assert result.stdout.split() == expected, result.stderr
    # Another list, or another order, would train other models from the same seed.
    digest = hashlib.sha256(" ".join(expected).encode()).hexdigest()
    assert digest[:16] == "bc1a5ce80c1bab52"
