"""Prefixes on disk: found again, within their budget, and never worse than none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.cache.sealed_file import sealed_bytes
from mlx_delta.config import DeltaConfig
from mlx_delta.prefixes import PrefixCache, PrefixDirectory
from tests.prefixes.test_prefix_cache import MODEL, TEXT, as_if_undisturbed, filled
from tests.tiny import SMALL, llama_model

ROOM = 1 << 30


class Store(PrefixCache):
    """A store in a directory, as after a restart; and what it said."""

    def __init__(self, path: Path, budget: int = ROOM):
        self.said: list[str] = []
        super().__init__(directory=PrefixDirectory(path, budget, self.said.append))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A directory with a text of 100 tokens."""
    Store(tmp_path).insert_cache("m", TEXT[:100], filled(TEXT[:100]))
    return tmp_path


def files(folder: Path, kind: str = "*") -> list[Path]:
    return sorted(folder.glob(f"v1/*/*/{kind}-*.safetensors"))


def found(folder: Path, text=TEXT[:130], known: int = 100) -> list[str]:
    """Fetch, compare with an undisturbed run; what was said."""
    store = Store(folder)
    caches, rest = store.fetch_nearest_cache("m", text)
    assert len(text) - len(rest) == known
    assert caches is None or as_if_undisturbed(caches, text[:known], rest)
    return store.said


def test_a_text_is_found_after_a_restart(folder):
    assert found(folder) == []
    assert not list(folder.rglob("*.part"))


def test_by_another_process(folder):
    """Nothing of it depends on the process that wrote it, a hash's salt for one."""
    program = (
        "import mlx_delta, json, sys\n"
        "from mlx_delta.prefixes import PrefixCache, PrefixDirectory\n"
        "store = PrefixCache(directory=PrefixDirectory(sys.argv[1], 1 << 30))\n"
        "caches, rest = store.fetch_nearest_cache('m', json.loads(sys.argv[2]))\n"
        "assert caches[0].offset == 100 and len(rest) == 30"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder), json.dumps(TEXT[:130])],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr


def test_texts_share_files(folder):
    before = len(files(folder, "b"))
    Store(folder).insert_cache("m", TEXT[:180], filled(TEXT[:180]))
    assert len(files(folder, "b")) == before + 10 and len(files(folder, "m")) == 2
    assert found(folder, TEXT[:200], 180) == []


def test_a_prefix_of_another_setting_or_model_is_not_taken(folder):
    store = Store(folder)
    assert store.fetch_nearest_cache("n", TEXT)[0] is None
    other = llama_model(SMALL.changed(key_format="codes", key_bits=8), num_hidden_layers=2)
    assert store.fetch_nearest_cache("m", TEXT, other.make_cache())[0] is None
    assert store.fetch_nearest_cache("m", TEXT, MODEL.make_cache())[0] is not None


def test_every_changed_bit_is_noticed(folder):
    """Of a block and of a mark: said once, and the file is removed."""
    for kind in "bm":
        path = files(folder, kind)[0]
        whole = path.read_bytes()
        for place in np.random.default_rng(0).integers(0, len(whole), 12):
            broken = bytearray(whole)
            broken[place] ^= 1
            path.write_bytes(broken)
            (said,) = found(folder, known=0)
            assert str(path) in said and "\n" not in said
            # A bit of its name or format makes a file another's, which is left where it is.
            assert not path.exists() or path.read_bytes() == broken and "another version" in said
        path.write_bytes(whole)
    assert found(folder) == []


@pytest.mark.parametrize("size", [0, 7, 8, 300, -1])
def test_files_that_were_cut_off(folder, size):
    path = files(folder, "b")[1]
    path.write_bytes(path.read_bytes()[:size])
    (said,) = found(folder, known=0)
    assert f"{path} was damaged and is removed: " in said
    assert found(folder, known=0) == []


@pytest.mark.parametrize("name", ["b-*", "m-*", "layout.json"])
def test_what_is_broken_is_written_anew(folder, name):
    path = sorted(folder.glob(f"v1/*/*/{name}"))[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    store = Store(folder)
    assert store.fetch_nearest_cache("m", TEXT)[0] is None and len(store.said) == 1
    assert store.directory.nbytes == sum(p.stat().st_size for p in files(folder))
    store.insert_cache("m", TEXT[:100], filled(TEXT[:100]))
    assert path.read_bytes() == whole
    assert store.directory.nbytes == sum(p.stat().st_size for p in files(folder))
    assert found(folder) == []


def test_what_a_killed_process_left_is_removed(folder):
    place = files(folder)[0].parent
    for name, age in ((".old.part", 7200), (".new.part", 0)):
        (place / name).write_bytes(b"half")
        os.utime(place / name, (time.time() - age,) * 2)
    assert found(folder) == []
    assert [path.name for path in place.glob(".*.part")] == [".new.part"]


def test_newer_and_foreign_files_stay(folder):
    path = files(folder, "m")[0]
    newer = sealed_bytes({"x": np.zeros(3)}, {"format": "mlx_delta prefix 2", "name": "y"})
    path.write_bytes(newer)
    (folder / "v2").mkdir()
    for file in ("v2/x", "notes.txt", "v1/notes.txt"):
        (folder / file).write_text("mine")
    layout = next(folder.glob("v1/*/*/layout.json"))
    (said,) = found(folder, known=0)
    assert "written by another version" in said and path.read_bytes() == newer
    layout.write_text(json.dumps({**json.loads(layout.read_text()), "version": 2}))
    (said,) = found(folder, known=0)
    assert "layout.json is left out: it was written by another version" in said
    Store(folder, 1).insert_cache("m", TEXT[:60], filled(TEXT[:60]))
    assert (folder / "v2/x").read_text() == (folder / "v1/notes.txt").read_text() == "mine"


def test_the_oldest_goes_when_the_budget_is_spent(folder):
    size = sum(path.stat().st_size for path in files(folder))
    store = Store(folder, int(2.5 * size))
    for i in (100, 150):
        text = TEXT[i : i + 100]
        if i == 150:  # used since
            assert store.fetch_nearest_cache("m", TEXT[:130])[0] is not None
            store.trim_to(n_bytes=0)
        store.insert_cache("m", text, filled(text))
        assert sum(path.stat().st_size for path in files(folder)) <= 2.5 * size
    assert found(folder) == []
    assert found(folder, TEXT[100:230], 0) == [] and found(folder, TEXT[150:260], 100) == []


def test_a_full_disk_is_said_once_and_gone_on_without(tmp_path, monkeypatch):
    store = Store(tmp_path)
    real, left = os.replace, [3]

    def replace(*paths):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*paths)

    monkeypatch.setattr("mlx_delta.prefixes.disk.os.replace", replace)
    for i in range(3):
        text = TEXT[i : i + 100]
        store.insert_cache("m", text, filled(text))
    (said,) = store.said
    assert said.endswith("No space left on device; prefixes are kept in memory only.")
    assert not list(tmp_path.rglob("*.part")), "nothing half written"
    caches, rest = store.fetch_nearest_cache("m", TEXT[:130])
    assert as_if_undisturbed(caches, TEXT[:100], rest), "from memory"
    assert found(tmp_path, known=0) == []


@pytest.mark.parametrize("kind", ["a file", "below a file", "write-protected", "no name"])
def test_places_that_are_no_directory(tmp_path, kind):
    path = {"no name": "x\0y", "below a file": "x/y"}.get(kind, "x")
    if kind != "write-protected":
        (tmp_path / "x").write_text("mine")
    elif os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    else:
        (tmp_path / "x" / "v1").mkdir(parents=True, mode=0o500)
    store = Store(f"{tmp_path}/{path}")
    store.insert_cache("m", TEXT[:100], filled(TEXT[:100]))
    (said,) = store.said
    assert "can't write in" in said and said.endswith("prefixes are kept in memory only.")
    assert store.fetch_nearest_cache("m", TEXT)[0] is not None


def test_files_that_vanish(folder):
    """Another process made room."""
    store = Store(folder)
    for path in files(folder, "b")[:2]:
        path.unlink()
    assert store.fetch_nearest_cache("m", TEXT)[0] is None and store.said == []


def test_bytes_are_those_of_the_caches(tmp_path):
    """No more than 2 percent beyond what caches of 2,000 tokens take."""
    model = llama_model(
        delta=DeltaConfig(sinks=3, key_bits=4, value_bits=16),
        head_dim=64,
        num_hidden_layers=3,
    )
    text = np.random.default_rng(0).integers(0, 4096, 2000).tolist()
    caches = filled(text, model)
    Store(tmp_path).insert_cache("m", text, caches)
    size = sum(path.stat().st_size for path in files(tmp_path))
    assert size <= 1.02 * sum(cache.nbytes for cache in caches)
    mx.clear_cache()
