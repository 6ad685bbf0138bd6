"""Prompt caches on disk: what is written can be read, and nothing else is believed."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)

import mlx_delta
from mlx_delta.cache import prompt_file
from mlx_delta.generate import make_caches
from mlx_delta.generate.saved import check_model_fits
from tests.cache import hostile
from tests.fixtures import make
from tests.tiny import SMALL, llama_model, tokens

METADATA = {"model": "x", "tokenizer_config": "{}"}
DELTAS = SMALL.changed(level=0.03, key_bits=4, value_bits=4)
KINDS = {
    "dense": (None, KVCache),
    "sliding": (None, lambda: RotatingKVCache(32, 4)),
    "quantized": (None, lambda: QuantizedKVCache(32, 8)),
    "held": (SMALL, None),
    "deltas": (DELTAS, None),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """A model, a file of its caches after 70 tokens, and the logits that follow."""
    config, make = KINDS[request.param]
    model = llama_model(config, head_dim=32, num_hidden_layers=2)
    caches = make_caches(model) if make is None else [make() for _ in model.layers]
    mx.eval(model(tokens(70), cache=caches))
    file = tmp_path_factory.mktemp("files") / "x.safetensors"
    prompt_file.save(file, caches, METADATA)
    return model, file, _next(model, caches)


def _next(model, caches) -> np.ndarray:
    return np.array(model(tokens(5, seed=1), cache=caches))


def _outcome(model, file: Path, content: bytes, wanted: np.ndarray, following=_next) -> str:
    """``refused`` with one line, ``same`` logits, or ``other`` ones."""
    file.write_bytes(content)
    try:
        caches, _ = prompt_file.load(file)
        check_model_fits(model, caches)
        logits = following(model, caches)
    except ValueError as error:
        assert "\n" not in str(error)
        return "refused"
    return "same" if np.array_equal(logits, wanted) else "other"


def test_a_file_is_read_back(kind):
    model, file, wanted = kind
    caches, metadata = prompt_file.load(file)
    assert np.array_equal(_next(model, caches), wanted)
    assert re.fullmatch("[0-9a-f]{64}", metadata.pop("sha256")) and metadata == METADATA


def test_mlx_lm_reads_it_too(kind):
    model, file, wanted = kind
    caches, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert np.array_equal(_next(model, caches), wanted)
    assert metadata["model"] == "x" and metadata["tokenizer_config"] == "{}"


def test_files_of_mlx_lms_are_read(kind, tmp_path):
    model, file, wanted = kind
    theirs = tmp_path / "theirs.safetensors"
    save_prompt_cache(str(theirs), load_prompt_cache(str(file)), METADATA)
    caches, metadata = prompt_file.load(theirs)
    assert np.array_equal(_next(model, caches), wanted) and metadata == METADATA


def test_no_flipped_bit_changes_a_result(kind, tmp_path):
    model, file, wanted = kind
    outcomes = [
        _outcome(model, tmp_path / "x.safetensors", content, wanted)
        for content in hostile.flips(file.read_bytes(), 60)
    ]
    assert "other" not in outcomes and outcomes.count("refused") > 50


def test_cut_files(kind, tmp_path):
    model, file, wanted = kind
    content = file.read_bytes()
    for end in [*range(0, 80, 7), *range(80, len(content), len(content) // 10)]:
        cut = _outcome(model, tmp_path / "x.safetensors", content[:end], wanted)
        assert cut == "refused", end


def test_headers_that_lie(kind, tmp_path):
    model, file, wanted = kind
    for what, content in hostile.lying_headers(file.read_bytes()):
        outcome = _outcome(model, tmp_path / "x.safetensors", content, wanted)
        assert outcome in ("refused", "same"), what


@pytest.mark.parametrize("config", [SMALL, DELTAS], ids=["held", "deltas"])
def test_states_that_lie(config, tmp_path):
    model = llama_model(config, head_dim=32, num_hidden_layers=2)
    caches = make_caches(model)
    mx.eval(model(tokens(70), cache=caches))
    file = tmp_path / "x.safetensors"
    prompt_file.save(file, caches, METADATA)
    wanted, outcomes = _next(model, caches), {}
    for what, content in hostile.hostile_states(file.read_bytes()):
        outcomes[what] = _outcome(model, file, content, wanted)
    # Another setting within bounds is not a lie that can be seen.
    others = {what.split("=")[0] for what, outcome in outcomes.items() if outcome == "other"}
    assert others <= {"config.threshold", "config.level", "config.window", "config.sinks"}
    assert len(outcomes) > 100


@pytest.mark.filterwarnings("ignore:.*packed by an earlier version")
def test_old_states_that_lie(tmp_path):
    """Of a file in a form that is gone: read, or refused in one line."""
    content = (make.HERE / "packed4.safetensors").read_bytes()
    model, _ = mlx_delta.load(make.HERE / "model")
    model.set_dtype(mx.float32)
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)

    def following(model, caches) -> np.ndarray:
        return make.follow(model, caches)[0]

    wanted = following(model, prompt_file.load(file)[0])
    states = hostile.hostile_states(content)
    outcomes = {what: _outcome(model, file, lie, wanted, following) for what, lie in states}
    others = {what.split("=")[0] for what, outcome in outcomes.items() if outcome == "other"}
    assert others <= {"config.key_bits", "config.threshold", "config.threshold_mode"}
    assert len(outcomes) > 100 and sum(x == "refused" for x in outcomes.values()) > 90


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c, "offset", 10_000),
        lambda c: setattr(c, "offset", -1),
        lambda c: setattr(c, "offset", 1.5),
        lambda c: setattr(c, "keys", c.keys[:, :, :, :8].astype(mx.int32)),
        lambda c: setattr(c, "keys", c.keys[:, :1]),
        lambda c: setattr(c, "values", c.values[:, :, :8]),
        lambda c: setattr(c, "keys", mx.concatenate([c.keys, c.keys])),
        lambda c: setattr(c, "keys", c.keys[0]),
        lambda c: setattr(c, "keys", None),
        lambda c: setattr(c, "offset", c.offset - 1),
    ],
    ids=[
        *("beyond the room", "negative", "no count", "whole numbers", "heads", "length"),
        *("rows", "dimensions", "none", "another layer has more"),
    ],
)
def test_dense_caches_whose_parts_do_not_fit(tmp_path, change):
    model = llama_model(None)
    caches = make_caches(model)
    mx.eval(model(tokens(20), cache=caches))
    change(caches[0])
    file = tmp_path / "x.safetensors"
    prompt_file.save(file, caches, METADATA)
    with pytest.raises(ValueError, match="is not a prompt cache"):
        prompt_file.load(file)


# Writing.


@pytest.fixture
def caches():
    model = llama_model(None)
    caches = make_caches(model)
    mx.eval(model(tokens(20), cache=caches))
    return caches


def _save(file, caches) -> None:
    prompt_file.save(file, caches, METADATA)
    assert len(prompt_file.load(file)[0]) == len(caches)


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path, caches):
    before = os.umask(0o027)
    try:
        _save(tmp_path / "x.safetensors", caches)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664], ids=oct)
def test_a_file_that_is_there_keeps_its_mode(tmp_path, caches, mode):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"old")
    file.chmod(mode)
    _save(file, caches)
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize("there", [True, False], ids=["file", "dangling"])
def test_links_stay_links(tmp_path, caches, there):
    target, link = tmp_path / "far" / "target.safetensors", tmp_path / "x.safetensors"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    link.symlink_to(target)
    _save(link, caches)
    assert link.is_symlink() and target.is_file() and not target.is_symlink()
    assert [p.name for p in target.parent.iterdir()] == ["target.safetensors"]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/null")


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.skipif(os.name == "nt", reason="POSIX devices")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_pipe, "is a device or a pipe"),
        (_device, "is a device or a pipe"),
        (_loop, "can't write"),
        (Path.mkdir, "is a directory"),
    ],
)
def test_what_is_no_file_stays_what_it_is(tmp_path, caches, make, message):
    path = tmp_path / "x.safetensors"
    make(path)
    before = path.lstat().st_mode
    with pytest.raises(OSError, match=message):
        prompt_file.save(path, caches, METADATA)
    assert path.lstat().st_mode == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["x", "x.npz", "x.safetensors.bak", ".safetensors", "a\0.x"])
def test_names_that_could_not_be_read_back(tmp_path, caches, name):
    with pytest.raises(OSError, match="must end in .safetensors"):
        prompt_file.save(tmp_path / name, caches, METADATA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("step", ["save_prompt_cache", "seal", "_to_disk"])
def test_no_error_leaves_a_temporary_file(tmp_path, caches, monkeypatch, step, error):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"old")

    def fail(*_, **__):
        assert len(list(tmp_path.iterdir())) == 2
        raise error("no space left")

    monkeypatch.setattr(prompt_file, step, fail)
    with pytest.raises(OSError if error is RuntimeError else error):
        prompt_file.save(file, caches, METADATA)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert file.read_bytes() == b"old"


def test_a_file_cut_short_on_the_way_is_not_put_in_place(tmp_path, caches, monkeypatch):
    def cut(file, *_):
        save_prompt_cache(file, *_)
        os.truncate(file, os.path.getsize(file) - 1)

    monkeypatch.setattr(prompt_file, "save_prompt_cache", cut)
    with pytest.raises(OSError, match="can't write"):
        prompt_file.save(tmp_path / "x.safetensors", caches, METADATA)
    assert not list(tmp_path.iterdir())
