"""The training of the demo models: recipes, batches and stages; torch only where it is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_delta.loading import find_model

TRAINER = Path(__file__).parents[1] / "examples" / "train_demo"

pytestmark = pytest.mark.skipif(not TRAINER.is_dir(), reason="the examples are not here")

DRAW = f"""
import sys
sys.modules.update(torch=None, mlx=None, mlx_delta=None)
import dataclasses, json
from pathlib import Path
import numpy as np
from data import Batches, Stage, encode_documents, read_recipe, read_text
from drawing import ANSWER, SILENT, Drawers
from schedule import Schedule, TimedStage, learning_rate
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({str(find_model("demo") / "tokenizer.json")!r})
text = "It was a dark night. The wind was in the trees, and the old man had gone home. " * 400
prose = encode_documents(tokenizer, [text])
batches = Batches(tokenizer, prose, 1024, seed=3)
"""


def run(code: str) -> object:
    """What a script in the trainer's folder prints, as JSON; the scripts import each other."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=TRAINER, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_stage_of_every_recipe_draws_full_batches():
    code = (
        DRAW
        + """
found = {}
for file in sorted(Path().glob("recipe*.toml")):
    kind = TimedStage if "gpu" in file.name else Stage
    found[file.name] = []
    for stage in read_recipe(file, kind):
        for step in range(4):
            ids, silent, answers = batches.draw(stage, step)
            assert str(ids.shape[1] - 1) in stage.lengths and ids.max() < 4096
            assert len(ids) == max(1, 1024 // (ids.shape[1] - 1))
            assert silent.shape == answers.shape == (len(ids), ids.shape[1] - 1)
            assert not (silent & answers).any()
        found[file.name].append(stage.name)
print(json.dumps(found))
"""
    )
    assert run(code) == {
        "recipe.toml": ["prose", "packed", "scattered", "long", "decay", "far"],
        "recipe_bitnet.toml": ["prose", "packed", "rounded", "scattered", "long", "decay", "far"],
        "recipe_gpu.toml": ["prose", "packed", "scattered", "long", "far", "farther"],
    }


@pytest.mark.parametrize("wording", [True, False], ids=["wording learnt", "wording silent"])
def test_answers_were_told_and_only_what_is_random_or_wording_is_silent(wording):
    code = (
        DRAW
        + f"""
stage = Stage(name="", tokens=1, lengths={{"256": 1.0}}, prose=0, templates={{"password": 1.0}},
              wording={wording})
ids, silent, answers = batches.draw(stage, 0)
rows = []
for row, quiet, asked in zip(ids, silent, answers):
    # Words that follow each other, as text: where a run begins, a bar.
    def words(mask):
        starts = np.flatnonzero(np.diff([False, *mask]) & mask)
        return [tokenizer.decode([int(t) for t in row[1:][s : s + list(mask[s:]).index(False)]])
                for s in starts if not mask[s:].all()]
    rows.append([tokenizer.decode(row.tolist()), words(quiet), words(asked)])
print(json.dumps(rows))
"""
    )
    rows = run(code)
    assert len(rows) == 4
    for text, silent, answers in rows:
        assert answers and silent
        told = {s.split(" is ")[-1].strip() for s in silent if "Remember" in s or wording}
        assert {answer.strip() for answer in answers} <= told
        assert all(f"is{value}." in text for value in answers)
        assert any("Remember: the password of" in s for s in silent) is not wording


def test_processes_draw_the_batches_that_one_would():
    code = (
        DRAW
        + """
stages = read_recipe(Path("recipe_gpu.toml"), TimedStage)
schedule = Schedule(stages, 512)
drawers = Drawers(batches, stages, 512, processes=2, slots=3)
found = []
for round in range(3):
    drawers.order(2, ahead=3)
    while drawers.under_way:
        with drawers.batch() as (ids, mask):
            found.append((ids.tolist(), mask.tolist()))
drawers.stop()
expected = []
for step in range(9):
    ids, silent, answers = batches.draw(stages[2], step)
    mask = np.pad(silent * SILENT + answers * ANSWER, ((0, 0), (1, 0)))
    expected.append((ids.tolist(), mask.tolist()))
print(json.dumps([len(found), sorted(found) == sorted(expected)]))
"""
    )
    assert run(code) == [9, True]


def test_a_batch_that_cannot_be_drawn_is_named_and_not_waited_for():
    code = (
        DRAW
        + """
stages = [TimedStage(name="", until=1, lengths={"99999": 1.0}, prose=1.0)]
drawers = Drawers(batches, stages, 99999, processes=1, slots=1)
drawers.order(0, ahead=1)
try:
    with drawers.batch():
        print(0)
except RuntimeError as error:
    print(json.dumps(str(error)))
drawers.stop()
"""
    )
    assert run(code).startswith("a batch could not be drawn: ValueError")


def test_stages_end_by_recall_or_by_the_clock():
    code = (
        DRAW
        + """
schedule = Schedule(read_recipe(Path("recipe_gpu.toml"), TimedStage), 2048)
names = []
for done, recall in [(0.04, {}), (0.05, {}), (0.055, {256: 0.95}), (0.06, {256: 0.9}),
                     (0.07, {256: 0.95}), (0.1, {1024: 1.0}), (0.37, {}), (0.48, {2048: 0.94}),
                     (0.89, {2048: 1.0}), (0.9, {}), (1.0, {})]:
    schedule.advance(done, recall)
    names.append(schedule.stage.name)
rates = [learning_rate(s, d, 100, 0.5) for s, d in [(0, 0), (49, 0.1), (200, 0.5), (200, 0.75),
                                                    (200, 1)]]
print(json.dumps([names, schedule.lengths, rates]))
"""
    )
    names, lengths, rates = run(code)
    assert names == [
        *("prose", "packed", "packed", "packed", "scattered", "scattered", "long", "far"),
        *("far", "farther", "farther"),
    ]
    assert lengths == [256, 512, 1024, 2048]
    assert rates == [0.01, 0.5, 1.0, 0.5, 0.005]


def test_the_gpus_model_is_the_other_one():
    """Losses and gradients of the two, and that the optimizer in stacks steps as the other."""
    pytest.importorskip("torch")
    code = """
import json, torch
from flat import FlatLlama
from model import ChunkedCrossEntropy, Llama, ModelConfig
from optimizer import make_optimizers
torch.manual_seed(0)
torch.set_num_threads(1)
config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                     head_dim=8, intermediate_size=48, max_position_embeddings=64)
flat, plain = FlatLlama(config, torch.float32), Llama(config)
plain.load_state_dict(flat.state_dict())
ids, weights = torch.randint(0, 64, (2, 33)), torch.rand(2, 32)
loss, each = flat.losses(ids, weights)
loss.backward()
hidden = plain.hidden(ids[:, :-1]).flatten(0, 1)
other, others = ChunkedCrossEntropy.apply(hidden, plain.embed_tokens.weight, ids[:, 1:].flatten(),
                                          weights.flatten(), torch.float32)
other.backward()
def far(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())
grads = [far(a.grad, b.grad) for a, b in zip(flat.parameters(), plain.parameters())]
stacked = make_optimizers(flat, 0.02, 1e-3, stacked=True)
single = make_optimizers(plain, 0.02, 1e-3)
before = [p.detach().clone() for p in plain.parameters()]
for _ in range(2):
    for optimizer in stacked + single:
        optimizer.step()
steps = [far(a - p, b - p) for a, b, p in zip(flat.parameters(), plain.parameters(), before)]
print(json.dumps([far(each.flatten(), others), max(grads), max(steps)]))
"""
    losses, grads, steps = run(code)
    assert max(losses, grads) < 1e-4
    assert steps < 0.03  # the iteration is in bfloat16
