"""Prompt caches between runs: conversations go on, and a file is believed only so far."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import cache_prompt
from mlx_lm.models.cache import KVCache, load_prompt_cache

import mlx_delta
from mlx_delta.cache import prompt_file
from mlx_delta.generate.saved import same_model, setting_of
from tests.generate.conftest import TEMPLATE, set_template
from tests.tiny import LLAMA, llama_model, write_llama

# Cut where tokens are cut too: before a space.
DOCUMENT = "It was" + " a dark night, and the wind was in the trees. It was" * 8
QUESTION = " in the trees?"
DELTA = ["--delta-threshold", "1", "--delta-block-size", "8", "--delta-window", "16"]
DELTA += ["--delta-sinks", "3"]


@pytest.fixture
def refused(command_line):
    def call(*flags: object) -> str:
        status, out, err = command_line("-m", "8", *flags)
        assert status == 1 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return call


@pytest.fixture
def saved(run, chat_path, tmp_path):
    file = tmp_path / "document.safetensors"
    run("--model", chat_path, "-p", DOCUMENT, "--save-prompt-cache", file, *DELTA)
    return file


def test_the_users_turn_stays_open(run, chat_path, saved):
    whole = run("--model", chat_path, "-p", DOCUMENT + QUESTION, *DELTA)
    asked = run("--model", chat_path, "--prompt-cache-file", saved, "-p", QUESTION)
    assert asked["text"] == whole["text"]
    again = run("--prompt-cache-file", saved, "-p", QUESTION)
    assert again["text"] == whole["text"], "the file is not changed by a question"


def test_the_file_holds_what_mlx_lms_cache_prompt_holds(chat_path, saved, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs.safetensors"
    flags = ["--model", str(chat_path), "--prompt", DOCUMENT, "--prompt-cache-file", str(theirs)]
    monkeypatch.setattr(sys, "argv", ["cache_prompt", *flags])
    cache_prompt.main()
    ours, stock = load_prompt_cache(str(saved)), load_prompt_cache(str(theirs))
    assert [c.offset for c in ours] == [c.offset for c in stock]
    # Values of the first layer do not depend on attention: the same tokens give the same ones.
    values = ours[0].keys_and_values()[1], stock[0].keys_and_values()[1]
    assert mx.allclose(*values, atol=1e-5)


def test_the_answer_while_saving_is_that_of_the_whole_prompt(run, chat_path, tmp_path):
    file = tmp_path / "x.safetensors"
    flags = ("--model", chat_path, "-p", DOCUMENT, *DELTA)
    plain, saving = run(*flags), run(*flags, "--save-prompt-cache", file)
    same = ("text", "prompt_tokens", "prefill_sparsity", "overall_sparsity", "delta")
    assert {k: saving[k] for k in same} == {k: plain[k] for k in same}
    assert saving["prompt_tps"] > 0 and saving["prefill_sparsity"] > 0


@pytest.mark.parametrize(
    "more",
    [["--prefill-response", "In the"], ["--system-prompt", "Be brief."]],
    ids=["answer begun", "system"],
)
def test_what_surrounds_the_message_goes_on_too(run, chat_path, tmp_path, more):
    file = tmp_path / "x.safetensors"
    model = ("--model", chat_path)
    run(*model, "-p", DOCUMENT, "--save-prompt-cache", file, *DELTA, *more)
    whole = run(*model, "-p", DOCUMENT + QUESTION, *DELTA, *more)
    later = more if more[0] == "--prefill-response" else []
    asked = run(*model, "-p", QUESTION, "--prompt-cache-file", file, *later)
    assert asked["text"] == whole["text"]


def test_a_saved_prompt_is_saved_again_with_more(run, chat_path, saved, tmp_path):
    more = tmp_path / "more.safetensors"
    model = ("--model", chat_path)
    middle = " " + DOCUMENT
    run(*model, "--prompt-cache-file", saved, "-p", middle, "--save-prompt-cache", more)
    asked = run(*model, "--prompt-cache-file", more, "-p", QUESTION)
    assert asked["text"] == run(*model, "-p", DOCUMENT + middle + QUESTION, *DELTA)["text"]


def test_what_was_begun_without_a_template_goes_on_without(run, chat_path, tmp_path):
    file = tmp_path / "x.safetensors"
    model = ("--model", chat_path)
    raw = (*DELTA, "--ignore-chat-template")
    run(*model, "-p", DOCUMENT, "--save-prompt-cache", file, *raw)
    asked = run(*model, "--prompt-cache-file", file, "-p", QUESTION)
    assert asked["text"] == run(*model, "-p", DOCUMENT + QUESTION, *raw)["text"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-delta"], "--no-delta contradicts the prompt cache"),
        (["--delta-window", "64"], "--delta-window 64 contradicts the prompt cache, which was "),
        (["--delta-key-bits", "8"], "--delta-key-bits 8 contradicts"),
        (["--delta", "key_bits=8"], "--delta key_bits 8 contradicts"),
        (["--delta-paper"], "--delta-paper contradicts"),
        (["--max-kv-size", "64"], "--max-kv-size comes too late with --prompt-cache-file"),
        (["--system-prompt", "x"], "--system-prompt comes too late"),
        (["--adapter-path", "x"], "was made with no --adapter-path"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_contradict_the_cache(refused, chat_path, saved, flags, message):
    flags = [*flags, "-p", QUESTION, "--model", chat_path]
    assert message in refused("--prompt-cache-file", saved, *flags)


def test_flags_that_agree_with_the_cache(run, chat_path, saved):
    values = run("--model", chat_path, "--prompt-cache-file", saved, "-p", QUESTION, *DELTA)
    assert (values["delta"]["block_size"], values["delta"]["window"]) == (8, 16)


def test_the_report_names_the_setting_that_ran(run, refused, chat_path, tmp_path):
    dense, paper = tmp_path / "dense.safetensors", tmp_path / "paper.safetensors"
    model = ("--model", chat_path)
    run(*model, "-p", DOCUMENT, "--save-prompt-cache", dense, "--no-delta")
    values = run(*model, "-p", QUESTION, "--prompt-cache-file", dense)
    assert values["delta"] is None and values["overall_sparsity"] == 0
    assert run(*model, "-p", QUESTION, "--prompt-cache-file", dense, "--no-delta")
    message = refused("--prompt-cache-file", dense, "-p", "x", "--delta-sinks", "2", *model)
    assert "--delta-sinks contradicts the prompt cache, made without the delta" in message
    made = run(*model, "-p", DOCUMENT, "--save-prompt-cache", paper, "--delta-paper")
    values = run(*model, "-p", QUESTION, "--prompt-cache-file", paper, "--delta-paper")
    assert values["delta"] == made["delta"] and values["delta"]["run_value"] == "first"


def test_thresholds_of_layers_become_one_setting_again():
    for threshold in ((0.5, 1.0, 2.0), ((0.5, 1.0), (1.0, 1.5), (2.0, 2.0)), 1.5):
        config = mlx_delta.DeltaConfig(threshold=threshold)
        assert setting_of(llama_model(config).make_cache()) == config


# What a file may not do.


def test_a_cache_does_not_switch_on_remote_code(command_line, refused, tmp_path):
    path = write_llama(tmp_path / "model")
    marker = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    file.write_text(json.dumps(config))
    model = llama_model(None)
    caches = [KVCache() for _ in model.layers]
    model(mx.array([[1, 2, 3]]), cache=caches)
    hostile = tmp_path / "hostile.safetensors"
    metadata = {
        "model": str(path),
        "tokenizer_config": json.dumps({"trust_remote_code": True}),
        "trust_remote_code": "true",
        "model_config": json.dumps({"model_file": "evil.py"}),
    }
    prompt_file.save(hostile, caches, metadata)
    status, _, err = command_line("--prompt-cache-file", hostile, "-p", "x", "-m", "1")
    assert status == 1 and "trust_remote_code" in err and not marker.exists()
    flags = ("--prompt-cache-file", hostile, "-p", "x", "--trust-remote-code")
    assert "needs --model: a file must not choose whose code runs" in refused(*flags)
    assert not marker.exists()


def test_the_cache_says_which_model_it_is_of(run, refused, chat_path, saved, tmp_path):
    values = run("--prompt-cache-file", saved, "-p", "x")
    assert f"note: the model is {str(chat_path)!r}, which the prompt cache names" in values["notes"]
    link = tmp_path / "link"
    link.symlink_to(chat_path)
    assert run("--prompt-cache-file", saved, "-p", "x", "--model", link)["model"] == str(link)
    message = refused("--prompt-cache-file", saved, "-p", "x", "--model", "demo")
    assert "--model demo is not the model of the prompt cache" in message
    caches, _ = prompt_file.load(saved)
    prompt_file.save(saved, caches, {"model": "owner/name"})
    message = refused("--prompt-cache-file", saved, "-p", "x")
    assert "names the model 'owner/name', which is not here; give --model" in message
    prompt_file.save(saved, caches, {})
    assert "names no model; give --model" in refused("--prompt-cache-file", saved, "-p", "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"num_hidden_layers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("flags", [["--no-delta"], DELTA], ids=["dense", "delta"])
def test_caches_of_another_model_of_that_name(run, refused, chat_path, tmp_path, changes, flags):
    file = tmp_path / "x.safetensors"
    path = tmp_path / "model"
    shutil.copytree(chat_path, path)
    run("--model", path, "-p", DOCUMENT, "--save-prompt-cache", file, *flags)
    shutil.rmtree(path)
    write_llama(path, **changes)
    set_template(path, TEMPLATE)
    assert "the prompt cache " in refused("--model", path, "-p", "x", "--prompt-cache-file", file)


# Draft models.


def test_a_draft_model_changes_nothing_but_the_speed(run, chat_path, tmp_path):
    draft = write_llama(tmp_path / "draft", num_key_value_heads=4, head_dim=8, num_hidden_layers=2)
    model, drafted = ("--model", chat_path), ("--draft-model", draft)
    file, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    plain = run(*model, "-p", DOCUMENT, *DELTA, "--save-prompt-cache", file)
    values = run(*model, "-p", DOCUMENT, *DELTA, *drafted, "--save-prompt-cache", other)
    same = ("text", "prompt_tokens", "prefill_sparsity", "cache_bytes", "dense_cache_bytes")
    assert {k: values[k] for k in same} == {k: plain[k] for k in same}
    assert values["draft_cache_bytes"] > 0 and "draft_cache_bytes" not in plain
    asked = run(*model, "--prompt-cache-file", file, "-p", QUESTION)
    for saved in (file, other):
        values = run(*model, "--prompt-cache-file", saved, "-p", QUESTION, *drafted)
        assert {k: values[k] for k in same} == {k: asked[k] for k in same}
        assert "the draft model has not seen what the prompt cache holds" in values["notes"]


def test_sliding_windows_are_not_rewound(refused, tmp_path):
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    path = write_llama(tmp_path / "sliding", num_hidden_layers=2, **window)
    message = refused("--model", path, "--draft-model", path, "-p", DOCUMENT)
    assert "a draft model does not go together with caches that drop tokens" in message


# Writing.


def test_a_file_that_can_not_be_written_costs_no_answer(command_line, chat_path, tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"what was there before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ("--model", chat_path, "-p", DOCUMENT, "-m", "4", "--verbose", "False")
    _, text, _ = command_line(*flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        status, out, err = command_line(*flags, "--save-prompt-cache", file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 1 and out == text and text.strip()
    assert err.startswith("error: [prompt_cache] can't write") and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert file.read_bytes() == b"what was there before"


def test_directories_that_can_not_be_written(refused, chat_path, tmp_path):
    target = tmp_path / "locked"
    target.mkdir()
    target.chmod(0o500)
    if os.access(target, os.W_OK):
        pytest.skip("this user may write anywhere")
    flags = ("--model", chat_path, "-p", "x", "--save-prompt-cache", target / "x.safetensors")
    assert "can't write in" in refused(*flags)


def test_the_context_counts_what_is_cached(run, command_line, tmp_path):
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    path = write_llama(
        tmp_path / "sliding", num_hidden_layers=2, max_position_embeddings=40, **window
    )
    file = tmp_path / "x.safetensors"
    night = "night" + " night" * 29
    length = run("--model", path, "-p", night, "--save-prompt-cache", file)["prompt_tokens"]
    assert LLAMA["max_position_embeddings"] > 40 > length > 20
    tail = " night" * (40 - length)
    values = run("--model", path, "-p", tail, "--prompt-cache-file", file)
    assert values["prompt_tokens"] + length == 40 and values["generation_tokens"] == 1
    assert "note: at most 1 token fits the model's context of 40" in values["notes"]
    flags = ("--model", path, "-p", tail + " night", "--prompt-cache-file", file)
    status, _, err = command_line(*flags)
    assert status == 1 and "has 41 tokens but the model's context has 40" in err


def test_paths_of_models_are_compared_as_paths(tmp_path):
    (tmp_path / "a").mkdir()
    assert same_model(str(tmp_path / "a"), str(tmp_path / "." / "a" / ".." / "a"))
    assert not same_model("demo", str(Path(mlx_delta.__file__).parent / "bundled" / "demo-bitnet"))
