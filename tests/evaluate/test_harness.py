"""lm-evaluation-harness's tasks: answers against direct computations, batches, resuming, data."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import load_tokenizer

from mlx_delta.loading import find_model
from mlx_delta.measure.settings import Setting
from tests.evaluate.harness_data import squad, winogrande, write_jsonl
from tests.evaluate.harness_runs import SETTINGS, run, setting
from tests.tiny import llama_model

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra 'evaluate')")

from mlx_delta.evaluate import harness_model, rows  # noqa: E402
from mlx_delta.evaluate.harness import (  # noqa: E402
    HarnessOptions,
    run_harness,
)
from mlx_delta.evaluate.harness_model import HarnessModel  # noqa: E402


def harness_model_of(
    model: Any, tokenizer: Any, name: str = "dense", batch_size: int = 1, **changes: Any
) -> HarnessModel:
    options = {"max_gen_toks": None, "seed": 0, "done": {}, "save": lambda: None, **changes}
    return HarnessModel(model, tokenizer, setting(name), "task", batch_size, **options)


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=arg) for arg in args]


def direct(model: Any, name: str, context: list[int], continuation: list[int]) -> float:
    """A log-likelihood from one forward of the whole text, in NumPy."""
    tokens = context + continuation
    caches = setting(name).make_caches(model, len(tokens) - 1)
    logits = model(mx.array(tokens[:-1])[None], cache=caches)[0]
    values = np.array(logits, np.float64)[len(context) - 1 :]
    values -= values.max(-1, keepdims=True)
    logprobs = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return float(logprobs[np.arange(len(continuation)), continuation].sum())


# Answers.


@pytest.mark.parametrize("task", ["winogrande", "squadv2"])
@pytest.mark.parametrize("name", [*SETTINGS, "paper:threshold=0.5"])
def test_batches_change_nothing(model, tokenizer, data, name, task):
    # Stored keys are float16, which a batch may round the other way; blocks are padded to its
    # largest.
    close, slack = (5e-3, 0.1) if "key_bits" in name else (2e-4, 0.02)
    if name.startswith("paper"):
        slack = 0.05  # a row keeps the full keys of a block as large as the batch's largest
    results, answers = run(model, tokenizer, name, task, data)
    batched, batch_answers = run(model, tokenizer, name, task, data, batch_size=4)
    assert answers.keys() == batch_answers.keys() and len(answers) >= 12
    for key, kept in answers.items():
        other = batch_answers[key]
        if isinstance(kept["answer"], str):
            assert other["answer"] == kept["answer"]
        else:
            assert other["answer"][0] == pytest.approx(kept["answer"][0], abs=close)
            assert other["answer"][1] == kept["answer"][1]
        for cost in ("prefill", "decode", "overall"):
            assert other["cost"][cost] == pytest.approx(kept["cost"][cost], abs=1e-9)
        assert other["cost"]["bytes"] == pytest.approx(kept["cost"]["bytes"], rel=slack)
    same = ("metric", "score", "low", "high", "samples", "decode_sparsity", "prefill_sparsity")
    assert {n: batched["summary"][n] for n in same} == pytest.approx(
        {n: results["summary"][n] for n in same}, nan_ok=True
    )
    assert results["results"] == batched["results"]
    if name == "delta" and task == "squadv2":
        assert results["summary"]["prefill_sparsity"] > 0.1
        assert results["summary"]["decode_sparsity"] > 0.1


@pytest.mark.parametrize("name", ["dense", "delta", "paper", "window-only"])
def test_log_likelihoods_are_those_of_one_forward(model, tokenizer, name):
    row = squad()[2]
    context = f"{row['context']} {row['question']}"
    choices = [" unanswerable", " near the garden in the evening", "."]
    answering = harness_model_of(model, tokenizer, name)
    # The paper's window is measured on the text, so texts of one length share it.
    for group in [[choice] for choice in choices] if name == "paper" else [choices]:
        found = answering.loglikelihood(requests(*((context, c) for c in group)))
        for choice, (logprob, greedy) in zip(group, found, strict=True):
            start = tokenizer.encode(context)
            tokens = tokenizer.encode(context + choice)[len(start) :]
            assert logprob == pytest.approx(direct(model, name, start, tokens), abs=2e-4)
            assert not greedy  # of 4,096 random tokens


def test_delta_differs_from_dense(model, tokenizer):
    pair = (squad()[2]["context"], " and so they went on")
    found = [
        harness_model_of(model, tokenizer, n).loglikelihood(requests(pair))
        for n in ("dense", "delta")
    ]
    assert abs(found[0][0][0] - found[1][0][0]) > 1e-2


def test_one_context_is_prefilled_once(model, tokenizer, monkeypatch):
    fed: list[int] = []
    forward = Setting.forward
    monkeypatch.setattr(
        Setting, "forward", lambda self, m, t, c: fed.append(len(t)) or forward(self, m, t, c)
    )
    context = squad()[0]["context"]
    pairs = [(context, end) for end in (" here", " there", " over there")]
    harness_model_of(model, tokenizer).loglikelihood(requests(*pairs))
    length = len(tokenizer.encode(context))
    ends = [len(tokenizer.encode(context + end)) - length - 1 for _, end in pairs]
    assert fed == [length, *(end for end in ends if end)]


def test_greedy_is_recognised(model, tokenizer):
    context = tokenizer.encode("The river")
    token = int(
        mx.argmax(model(mx.array(context)[None], cache=[KVCache() for _ in range(3)])[0, -1])
    )
    batch = rows.Rows(model, setting("dense"), [context, context], True)
    (_, first), (_, second) = batch.score([[token], [token + 1]])
    assert first and not second


@pytest.mark.parametrize("name", ["dense", "delta"])
def test_ragged_rows_over_several_chunks(model, name, monkeypatch):
    monkeypatch.setattr(rows, "PREFILL_STEP", 48)
    monkeypatch.setattr(rows, "BUFFER_STEP", 16)
    rng = np.random.default_rng(0)
    texts = [
        (rng.integers(0, 4096, length).tolist(), [rng.integers(0, 4096, n).tolist() for n in ends])
        for length, ends in ((60, (1, 7)), (5, (50, 2)), (32, (1,)), (1, (3,)))
    ]
    found = rows.score_texts(model, setting(name), texts, 3, True)
    for (context, continuations), scores in zip(texts, found, strict=True):
        for continuation, ((logprob, _), _) in zip(continuations, scores, strict=True):
            expected = direct(model, name, context, continuation)
            assert logprob == pytest.approx(expected, abs=2e-3, rel=1e-5)


def test_empty_context_is_bos(model, tokenizer):
    tokens = tokenizer.encode(" the river", add_special_tokens=False)
    ((logprob, _),) = harness_model_of(model, tokenizer).loglikelihood(requests(("", " the river")))
    expected = direct(model, "dense", [tokenizer.bos_token_id], tokens)
    assert logprob == pytest.approx(expected, abs=1e-4)


def test_empty_continuation_is_certain(model, tokenizer):
    found = harness_model_of(model, tokenizer).loglikelihood(requests(("The river", "")))
    assert found == [(0.0, True)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_windows(tokenizer, batch_size):
    model = llama_model(max_position_embeddings=16)
    text = squad()[2]["context"]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert 32 < len(tokens) < 48
    (found,) = harness_model_of(model, tokenizer, "delta", batch_size).loglikelihood_rolling(
        requests((text,))
    )
    # Windows of 16 predictions; the last one has a full context too.
    whole = [tokenizer.bos_token_id, *tokens]
    expected = sum(direct(model, "delta", whole[i : i + 1], whole[i + 1 : i + 17]) for i in (0, 16))
    expected += direct(model, "delta", whole[-17:33], whole[33:])
    assert found == pytest.approx(expected, abs=1e-3)


def test_long_contexts_are_cut_on_the_left(tokenizer, capsys):
    model = llama_model(max_position_embeddings=24)
    context = squad()[2]["context"]
    tokens = tokenizer.encode(context)
    answering = harness_model_of(model, tokenizer, max_gen_toks=4)
    ((logprob, _),) = answering.loglikelihood(requests((context, " unanswerable")))
    end = tokenizer.encode(context + " unanswerable")[len(tokens) :]
    expected = direct(model, "dense", tokens[-(25 - len(end)) :], end)
    assert logprob == pytest.approx(expected, abs=1e-4)
    (text,) = answering.generate_until(requests((context, {"until": []})))
    (same,) = harness_model_of(llama_model(), tokenizer, max_gen_toks=4).generate_until(
        requests((context, {"until": []}))
    )
    assert text != same
    assert "1 prompts of task were cut on the left" in capsys.readouterr().err


def test_a_limit_beyond_the_context(tokenizer):
    answering = harness_model_of(llama_model(max_position_embeddings=24), tokenizer)
    with pytest.raises(ValueError, match="up to 32 tokens, which leaves no room .* of 24"):
        answering.generate_until(requests(("The", {"max_gen_toks": 32})))


# Generating.


def greedy_tokens(model: Any, tokenizer: Any, prompt: str, steps: int) -> list[int]:
    tokens = tokenizer.encode(prompt)
    for _ in range(steps):
        logits = model(mx.array(tokens)[None], cache=setting("delta").make_caches(model))
        tokens.append(int(mx.argmax(logits[0, -1])))
    return tokens[-steps:]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_limits_and_stops(model, tokenizer, batch_size, monkeypatch):
    steps: list[int] = []
    step = rows.Rows.step
    monkeypatch.setattr(rows.Rows, "step", lambda self, t: steps.append(len(t)) or step(self, t))
    prompts = [row["context"] for row in squad()[:3]]
    written = [greedy_tokens(model, tokenizer, prompt, 9) for prompt in prompts]
    text = tokenizer.decode(written[1])
    stop = tokenizer.decode(written[1][:5])[-2:]
    asked = [
        (prompts[0], {"until": [], "max_gen_toks": 9}),
        (prompts[1], {"until": ["\x00", stop], "max_gen_toks": 9}),
        (prompts[2], {"until": "", "max_gen_toks": 4}),
    ]
    answering = harness_model_of(model, tokenizer, "delta", batch_size)
    found = answering.generate_until(requests(*asked))
    assert found[0] == tokenizer.decode(written[0])
    assert found[1] == text[: text.index(stop)]
    assert found[2] == tokenizer.decode(written[2][:4])
    # Each row stops being fed as soon as it is done.
    assert sum(steps) <= 8 + 4 + 3
    shorter = harness_model_of(model, tokenizer, "delta", batch_size, max_gen_toks=2)
    assert shorter.generate_until(requests(*asked))[0] == tokenizer.decode(written[0][:2])


def test_eos_ends_a_text_and_is_not_in_it(model, tokenizer):
    prompt = squad()[0]["context"]
    written = greedy_tokens(model, tokenizer, prompt, 4)
    other = SimpleNamespace(
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        bos_token=tokenizer.bos_token,
        eos_token_ids={written[3]},
    )
    (text,) = harness_model_of(model, other, "delta").generate_until(
        requests((prompt, {"until": []}))
    )
    assert text == tokenizer.decode(written[: written.index(written[3])])


def test_sampling_has_a_seed_of_its_own(model, tokenizer):
    request = ("The river", {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 2.0})
    twice = requests(request, request)
    found = harness_model_of(model, tokenizer).generate_until(twice)
    assert found[0] != found[1]  # a repeat is another sample
    done: dict[str, Any] = {}
    mx.random.seed(99)
    first = harness_model_of(model, tokenizer, done=done, batch_size=2)
    assert first.generate_until(requests(request)) == found[:1]
    assert harness_model_of(model, tokenizer, done=done).generate_until(twice) == found
    assert harness_model_of(model, tokenizer, seed=1).generate_until(twice)[0] != found[0]
    cold = ("The river", {**request[1], "do_sample": False})
    greedy = harness_model_of(model, tokenizer).generate_until(requests(cold))
    (same,) = harness_model_of(model, tokenizer, seed=5).generate_until(requests(cold))
    assert greedy == [same]


@pytest.mark.parametrize("name", ["kv8", "kivi4", "window-only", "rotating:16"])
def test_settings_that_cannot_batch_say_so(tokenizer, name, capsys):
    model = llama_model(head_dim=64)  # mlx-lm quantizes in groups of 64
    pairs = requests(("The old river in the garden", " was"), ("A", " dog and a cat"))
    single = harness_model_of(model, tokenizer, name).loglikelihood(pairs)
    assert capsys.readouterr().err.count("note:") == 0
    assert harness_model_of(model, tokenizer, name, 4).loglikelihood(pairs) == single
    assert f"one at a time under {name!r}" in capsys.readouterr().err


# Stopping and going on.


@pytest.mark.parametrize("batch_size", [1, 4])
def test_resuming_repeats_nothing(model, tokenizer, data, batch_size, monkeypatch):
    asked: list[Any] = []
    for name in ("score_texts", "generate_texts"):
        original = getattr(harness_model, name)

        def counted(m: Any, s: Any, texts: Any, *rest: Any, original: Any = original) -> Any:
            asked.extend(json.dumps([original.__name__, text]) for text in texts)
            return original(m, s, texts, *rest)

        monkeypatch.setattr(harness_model, name, counted)
    whole, _ = run(model, tokenizer, "delta", "squadv2", data, batch_size=batch_size)
    everything, saves = sorted(asked), 0
    asked.clear()

    def interrupt() -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt

    options = HarnessOptions(data_dir=data, max_gen_toks=6, batch_size=batch_size)
    done: dict[str, Any] = {}
    args = (model, tokenizer, setting("delta"), "squadv2", options)
    with pytest.raises(KeyboardInterrupt):
        run_harness(*args, done, interrupt)
    assert len(done["answers"]) == min(2 * batch_size, 6)
    resumed = run_harness(*args, json.loads(json.dumps(done)), lambda: None)
    assert sorted(asked) == everything
    assert resumed == whole


def test_results_are_the_harness_own(model, tokenizer, data):
    results, answers = run(model, tokenizer, "dense", "winogrande", data, limit=5, num_shots=0)
    json.dumps(results, allow_nan=False)
    rows = winogrande()[:5]
    right = []
    for row in rows:
        start, end = row["sentence"].split("_")
        sums = []
        for option in (row["option1"], row["option2"]):
            context = tokenizer.encode(start + option)
            tokens = tokenizer.encode(start + option + " " + end.strip())[len(context) :]
            sums.append(direct(model, "dense", context, tokens))
        right.append(float(np.argmax(sums) == int(row["answer"]) - 1))
    stderr = np.std(right, ddof=1) / np.sqrt(5)
    assert results["results"]["winogrande"]["acc,none"] == np.mean(right)
    assert results["n-samples"]["winogrande"] == {"original": 8, "effective": 5}
    assert results["higher_is_better"]["winogrande"] == {"acc": True}
    assert results["configs"]["winogrande"]["dataset_path"] == "json"
    summary = results["summary"]
    assert (summary["metric"], summary["score"]) == ("acc", np.mean(right))
    assert summary["high"] - summary["score"] == pytest.approx(1.96 * stderr)
    assert summary["samples"] == 5 and summary["decode_sparsity"] is None
    assert summary["cache_bytes"] == 3 * 2 * 2 * 256 * 16 * 2  # layers, K and V, heads, room


def test_rolling_task(model, tokenizer, data):
    results, _ = run(model, tokenizer, "delta", "small_texts", data, batch_size=4)
    summary = results["summary"]
    assert (summary["metric"], summary["higher_is_better"]) == ("bits_per_byte", False)
    assert summary["score"] > 1 and summary["samples"] == 8


def test_chat_template(model, tokenizer, data, monkeypatch):
    with pytest.raises(ValueError, match="has no chat template; drop --apply-chat-template"):
        run(model, tokenizer, "dense", "squadv2", data, apply_chat_template=True)
    chat = load_tokenizer(
        find_model("demo"),
        {"chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<say>"},
    )
    prompts: list[str] = []
    encode = HarnessModel.tok_encode
    monkeypatch.setattr(
        HarnessModel,
        "tok_encode",
        lambda self, s, *a, **k: prompts.append(s) or encode(self, s, *a, **k),
    )
    run(model, chat, "dense", "squadv2", data, apply_chat_template=True, limit=1)
    assert prompts[0].startswith("<user>Title: Anna") and prompts[0].endswith("Answer:<say>")


def test_worked_examples(model, tokenizer, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="worked examples of 'winogrande'.*train.jsonl"):
        run(model, tokenizer, "dense", "winogrande", data, num_shots=2)
    write_jsonl(tmp_path / "winogrande" / "validation.jsonl", winogrande()[:2])
    write_jsonl(tmp_path / "winogrande" / "train-00000-of-00002.jsonl", winogrande()[2:4])
    write_jsonl(tmp_path / "winogrande" / "train-00001-of-00002.jsonl", winogrande()[4:])
    results, _ = run(model, tokenizer, "dense", "winogrande", tmp_path, num_shots=2)
    assert results["n-shot"] == {"winogrande": 2}
