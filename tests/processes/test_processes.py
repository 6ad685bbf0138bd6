"""Several processes on this machine, started by mlx.launch: the tokens of one, each its share."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

import mlx_delta
from mlx_delta.config import DeltaConfig
from mlx_delta.generate.command import main
from mlx_delta.generate.processes import Processes
from mlx_delta.models.parts import of_own_layers, share_of_heads
from mlx_delta.sensitivities import Sensitivities
from tests.processes.program import TEXT, TOKENS, run
from tests.tiny import LLAMA, SMALL, write_bitnet, write_checkpoint, write_llama

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("program.py")
STORED = "key_bits=4,value_bits=4"
SMALL_BLOCKS = "block_size=8,window=16"
# Four kv heads, which four processes can share: the demo has two.
FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 4}  # fmt: skip


class Alone:
    """As ``Processes`` of a single one."""

    first = True

    def of_each(self, number: int) -> list[int]:
        return [number]


def launch(n: int, *command: str) -> subprocess.CompletedProcess:
    """Run a command in ``n`` processes over the loopback."""
    port = next(
        port for port in range(21000 + 50 * (os.getpid() % 400), 60000, 10) if free(port, n)
    )
    # The command as it is installed, wherever its script lies.
    start = "from importlib.metadata import entry_points; "
    start += "entry_points(group='console_scripts')['mlx.launch'].load()()"
    flags = ["--backend", "ring", "-n", str(n), "--starting-port", str(port)]
    return subprocess.run(
        [sys.executable, "-c", start, *flags, sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def free(port: int, n: int) -> bool:
    """Whether nobody listens at ``n`` ports from this one on."""
    for i in range(n):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port + i)) == 0:
                return False
    return True


def cases_of(n: int, *cases: str) -> list[dict]:
    done = launch(n, str(PROGRAM), *cases)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == list(cases), done.stderr[-2000:]
    return lines


def check(case: dict, n: int) -> None:
    """The tokens of one process; and caches and weights that together are those of one."""
    model, sharing, setting = case["case"].split()
    alone = run(f"{model} none {setting}", Alone())
    pairs = list(zip(case["tokens"], alone["tokens"], alone["clear"], strict=True))
    assert case["same"] and sum(alone["clear"]) > TOKENS // 2
    assert all(one == other for one, other, clear in pairs if clear)
    if model == "demo":
        assert case["tokens"] == alone["tokens"]
    assert len(case["bytes"]) == n
    # A value more or less, where a run could as well end there.
    off = 1e-3 if "key_bits" in setting else 0
    assert sum(case["bytes"]) == pytest.approx(alone["bytes"][0], rel=off, abs=0)
    if sharing == "layers":
        assert sum(case["layers"]) == alone["layers"][0]
    else:
        assert case["layers"] == alone["layers"] * n
        if setting == "-":
            assert len(set(case["bytes"])) == 1  # held in full: equal shares
    assert max(case["kept"]) < alone["kept"][0]


def test_four_processes_give_the_tokens_of_one(tmp_path, request):
    path, qwen = write_llama(tmp_path / "four", **FOUR), write_qwen(tmp_path / "qwen")
    layers = [f"{qwen} layers {SMALL_BLOCKS},{STORED}", "demo layers -"]
    if not request.config.getoption("--all"):
        layers = layers[:1]  # the demo takes ten seconds
    cases = cases_of(4, f"{path} heads {SMALL_BLOCKS},{STORED}", *layers)
    for case in cases:
        check(case, 4)


def write_qwen(path: Path) -> Path:
    """A random Qwen 2, to which the delta is applied: mlx-lm's own sharding and pipeline."""
    config = {**LLAMA, **FOUR, "model_type": "qwen2", "head_dim": 8}
    del config["head_dim"]
    config |= {"hidden_size": 256, "max_position_embeddings": 2048}
    mx.random.seed(3)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    return write_checkpoint(path, config, dict(tree_flatten(model.parameters())))


def test_two_processes_print_once_what_one_prints(capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT * 2)
    flags = ("--model", "demo", "--max-tokens", "6", "--prompt-file", str(prompt))
    done = launch(2, "-m", "mlx_delta.generate", *flags)
    assert done.returncode == 0, done.stderr
    assert main(list(flags)) == 0
    alone = capsys.readouterr().out
    assert done.stdout.split("=" * 10)[1] == alone.split("=" * 10)[1]  # the text
    assert done.stdout.count("Generation: 6 tokens") == 1
    size = float(re.search(r"Cache: ([0-9.]+) MB", alone)[1])
    shares = re.search(r"Processes: 2, with caches of ([0-9.]+), ([0-9.]+) MB", done.stdout)
    assert float(shares[1]) == float(shares[2]) == pytest.approx(size / 2, abs=0.006)


@pytest.mark.parametrize("first", [True, False], ids=["first", "another"])
def test_a_prompt_that_the_first_process_cannot_read_ends_all(monkeypatch, first):
    told = []
    monkeypatch.setattr(Processes, "size", 2)
    monkeypatch.setattr(Processes, "first", first)
    monkeypatch.setattr(
        Processes, "_sum", lambda self, x: told.append(int(x)) or np.array(-1, np.int32)
    )

    def read() -> str:
        raise FileNotFoundError("--prompt-file /nowhere.txt")

    with pytest.raises(FileNotFoundError if first else SystemExit):
        Processes().share_text(read)
    assert told == ([-1] if first else [0])  # the others hear of it


class Group:
    """Stands for so many processes, where none is needed to be refused."""

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("write", "groups", "message"),
    [
        (write_llama, {"tensor_group": Group(4)}, "have 2 kv heads, which can't be split over 4"),
        (write_llama, {"pipeline_group": Group(9)}, "3 layers, which are no pipeline of 9"),
        (write_llama, {"pipeline_group": Group(2), "tensor_group": Group(2)}, "not both"),
        (write_llama, {"tensor_group": Group(2), "adapter_path": "x"}, "adapter_path does not"),
        (write_bitnet, {"tensor_group": Group(2)}, "mlx-lm can't split the heads of a bitnet"),
        (write_bitnet, {"pipeline_group": Group(2)}, "can't run the layers of a bitnet"),
    ],
    ids=["heads", "layers", "both", "adapter", "bitnet heads", "bitnet layers"],
)
def test_what_cannot_be_shared_is_named(tmp_path, write, groups, message):
    path = write(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        mlx_delta.load(path, SMALL, **groups)


def test_the_setting_of_a_share():
    weights = [np.arange(8.0).reshape(4, 2), None, np.ones((4, 2))]
    along = [np.arange(8.0).reshape(4, 2) - 3, None, None]
    whole = DeltaConfig(sensitivities=Sensitivities(weights, salience=along))
    share = share_of_heads(whole, 1, 2).sensitivities
    assert share.layers[0].tolist() == [[4, 5], [6, 7]] and share.layers[1] is None
    assert share.salience[0].tolist() == [[1, 2], [3, 4]]
    part = of_own_layers(whole, slice(1, 3), 2)
    assert [x is None for x in part.sensitivities.layers] == [True, False]
    assert of_own_layers(part, slice(1, 3), 2) == part  # it is theirs already
    heads = DeltaConfig(threshold=((1, 2, 3, 4), (5, 6, 7, 8)))
    assert share_of_heads(heads, 1, 2).threshold == ((3, 4), (7, 8))
    assert of_own_layers(heads, slice(1, 2), 1).threshold == ((5, 6, 7, 8),)
    assert share_of_heads(DeltaConfig(), 1, 2) == DeltaConfig()
