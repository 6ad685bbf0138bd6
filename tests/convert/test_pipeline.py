"""Interrupting, continuing, replacing, refusing; and how much memory it takes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_delta.convert.errors import ConvertError
from mlx_delta.convert.plan import Options

from . import checkpoints as made

BIG = made.LLAMA | {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "head_dim": 64,
    "num_key_value_heads": 4,
}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mlx_delta.convert", *map(str, arguments)]


def call(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    return made.write_llama(folder / "model", BIG, "F32", shards=3)


@pytest.fixture(scope="module")
def undisturbed(big) -> dict[str, bytes]:
    output = big.parent / "undisturbed"
    done = call(big, "-o", output, "--shard-size", "500kB")
    assert done.returncode == 0, done.stderr
    return contents(output)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_point_and_run_again_gives_the_same_bytes(seed, big, undisturbed, tmp_path):
    output = tmp_path / "undisturbed"
    arguments = (big, "-o", output, "--shard-size", "500kB")
    delay = random.Random(seed)
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(
            command(*arguments, "--no-verify"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # At a random point of the work itself: from the first file on.
        partial = output.with_name(output.name + ".partial")
        while process.poll() is None and not partial.exists():
            time.sleep(0.001)
        time.sleep(delay.random() * 0.4)
        kills += process.poll() is None
        process.kill()
        process.wait()
        if output.exists():
            pytest.skip("it was done before it could be killed")
    assert kills == 2
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert contents(output) == undisturbed
    assert not partial.exists()


def test_a_stopped_conversion_says_so_and_continues(big, undisturbed, tmp_path):
    output = tmp_path / "undisturbed"
    arguments = (big, "-o", output, "--shard-size", "500kB", "--no-verify")
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "undisturbed.partial"
    while process.poll() is None and len(list(partial.glob("*.safetensors"))) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was done before it could be stopped")
    assert process.returncode == 130 and not output.exists()
    assert "run the same command again to continue" in errors and "Traceback" not in errors
    done = call(*arguments)
    assert done.returncode == 0 and "continuing: " in done.stdout
    new = contents(output)
    weights = [name for name in undisturbed if name.endswith(".safetensors")]
    assert all(new[name] == undisturbed[name] for name in weights)


def test_other_settings_start_over(big, tmp_path, run):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "manifest.json").write_text('{"fingerprint": "x", "shards": {}}')
    (tmp_path / "out.partial" / "model.safetensors").write_text("left over")
    output, report = run(made.write_llama(tmp_path / "m"))
    assert report["totals"]["tensors"] and not (tmp_path / "out.partial").exists()


def test_a_damaged_shard_is_made_again(big, undisturbed, tmp_path):
    output = tmp_path / "undisturbed"
    arguments = (big, "-o", output, "--shard-size", "500kB", "--no-verify")
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL)
    partial = tmp_path / "undisturbed.partial"
    manifest = partial / "manifest.json"
    while process.poll() is None:
        if manifest.exists() and len(json.loads(manifest.read_text())["shards"]) > 2:
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    if not partial.exists():
        pytest.skip("it was done before it could be stopped")
    name = next(iter(json.loads(manifest.read_text())["shards"]))
    with (partial / name).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"wrong")
    assert call(*arguments).returncode == 0
    new = contents(output)
    assert all(new[n] == data for n, data in undisturbed.items() if n.endswith(".safetensors"))


def test_what_is_in_the_way_is_not_touched(run, tmp_path):
    source = made.write_llama(tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ConvertError, match="exists; choose another -o or add --overwrite"):
        run(source)
    with pytest.raises(ConvertError, match="no model directory; remove it yourself"):
        run(source, overwrite=True)
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "precious").write_text("x")
    with pytest.raises(ConvertError, match="is in the way"):
        run(source, name="b")
    (tmp_path / "c").write_text("x")
    with pytest.raises(ConvertError, match="is a file"):
        run(source, name="c")
    assert (tmp_path / "out" / "precious").exists() and (tmp_path / "b.partial/precious").exists()


@pytest.mark.parametrize("place", ["m", "m/inside", "."])
def test_the_output_must_not_be_in_or_around_the_source(place, run, tmp_path):
    source = made.write_llama(tmp_path / "around" / "m")
    with pytest.raises(ConvertError, match="choose another -o"):
        run(source, name=f"around/{place}", overwrite=True)
    assert (source / "model.safetensors").exists()


def test_overwrite_replaces_a_model(run, tmp_path):
    source = made.write_llama(tmp_path / "m")
    first, _ = run(source)
    (first / "stale").write_text("x")
    again, _ = run(source, overwrite=True, shim=True)
    assert not (again / "stale").exists() and (again / "delta_model.py").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_two_processes_do_not_share_an_output(run, tmp_path):
    import fcntl

    source = made.write_llama(tmp_path / "m")
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match="another process"):
            run(source)


def test_a_dry_run_says_all_and_writes_nothing(tmp_path):
    source = made.write_llama(tmp_path / "m", made.LLAMA3)
    before = sorted(p.stat().st_mtime_ns for p in source.iterdir())
    done = call(source, "-o", tmp_path / "out", "--target", "iphone", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.layers.*.mlp.down_proj.weight" in done.stdout
    assert "affine 4-bit, group 64" in done.stdout and "nothing was written" in done.stdout
    assert "iphone with 6 GB gives a model about 3.10 GB to 4.20 GB: it fits" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert sorted(p.stat().st_mtime_ns for p in source.iterdir()) == before


def test_the_plan_and_the_result_have_the_same_sizes(run, tmp_path):
    output, report = run(made.write_llama(tmp_path / "m"))
    header = 0
    for file in output.glob("*.safetensors"):
        header += 8 + int.from_bytes(file.read_bytes()[:8], "little")
    sizes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert sizes - header == report["totals"]["bytes"]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["totals"]["bytes"]


def test_the_report_names_errors_and_checksums(run, tmp_path):
    import hashlib

    source = made.write_llama(tmp_path / "m")
    output, _ = run(source)
    report = json.loads((output / "conversion_report.json").read_text())
    entry = next(t for t in report["tensors"] if t["name"].endswith("0.mlp.up_proj.weight"))
    assert entry["source_type"] == "BF16" and entry["target_type"] == "affine 4-bit, group 64"
    assert 0.02 < entry["error"]["relative_rms"] < 0.2
    assert entry["source_bytes"] == 128 * 64 * 2 and entry["bytes"] == 128 * 64 * 4.5 / 8
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert report["source"]["files"]["model.safetensors"]["sha256"] == digest
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    assert report["files"]["model.safetensors"]["sha256"] == digest
    assert str(tmp_path) not in (output / "conversion_report.json").read_text()


def test_the_comparison_finds_a_wrong_weight(run, tmp_path):
    from mlx_delta.convert.sources import SourceOptions, open_source
    from mlx_delta.convert.verify import run_verification, verify

    source = made.write_packed(tmp_path / "m")
    output, _ = run(source)
    opened = open_source(str(source), SourceOptions())
    found = verify(opened, output)
    assert found["wrong"] == [] and found["exact"] == 14 and found["kl"] < 0.02
    file = output / "model.safetensors"
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    start = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    data = bytearray(file.read_bytes())
    position = 8 + int.from_bytes(data[:8], "little") + start
    data[position] ^= 1 if data[position] & 3 != 1 else 3
    file.write_bytes(data)
    assert verify(opened, output)["wrong"] == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConvertError, match="up_proj.weight does not equal the source"):
        run_verification(str(source), output, SourceOptions())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_that_are_not_finite_are_refused(value, dtype, run, tmp_path):
    values = made.weights(made.LLAMA)
    values["model.layers.1.mlp.up_proj.weight"][100, 3] = value
    arrays = {name: made.to_array(array, dtype) for name, array in values.items()}
    source = made.write_hf(tmp_path / "m", made.LLAMA, arrays)
    with pytest.raises(ConvertError, match="up_proj.weight holds NaN or infinity"):
        run(source)


def test_values_beyond_a_type_are_refused(run, tmp_path):
    values = made.weights(made.LLAMA)
    values["model.norm.weight"][3] = 1e6
    arrays = {name: made.to_array(array, "BF16") for name, array in values.items()}
    source = made.write_hf(tmp_path / "m", made.LLAMA, arrays)
    with pytest.raises(ConvertError, match="model.norm.weight has values that F16 can't hold"):
        run(source, Options(dtype="F16"))


MEASURE = """
import json, sys
import mlx_delta.loading  # and so MLX and mlx-lm, whose own memory is not the converter's
from mlx_delta.convert.__main__ import main
from tests.convert.memory import peak_bytes
before = peak_bytes()
assert main(sys.argv[1:]) == 0
after = peak_bytes()
print(json.dumps({"growth": after - before, "peak": after}))
"""


@pytest.mark.parametrize(("target", "growth"), [("F16", 100e6), ("F32", 250e6)])
def test_memory_does_not_grow_with_the_model(target, growth, tmp_path):
    # 200 MB, half of it in one tensor: a converter that held it would take 100 MB more, and as
    # float32 300 MB, than the 55 and up to 180 MB that are seen whatever the size of the model.
    config = made.LLAMA | {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 51200,
        "tie_word_embeddings": True,
    }
    state = np.random.RandomState(0)
    import mlx.core as mx

    arrays = {}
    for name, shape in made.shapes(config).items():
        values = state.randint(0, 2**15, shape).astype(np.uint16)
        arrays[name] = mx.array((values & 0x83FF) | 0x3800).view(mx.float16)
    source = made.write_hf(tmp_path / "m", config | {"torch_dtype": "float16"}, arrays)
    assert (source / "model.safetensors").stat().st_size > 150e6
    extra = ["--dtype", "float32", "--q-bits", "16", "--embed-bits", "16"] * (target == "F32")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source, "-o", tmp_path / "out", "--no-verify", *extra],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["growth"] < growth, found
