"""Train a demo model: a small Llama or BitNet with a long memory. See README.md.

    python train.py --text books.txt --heldout other.txt --work run --export demo

Interrupt it when you like: the same command goes on from the last checkpoint in `--work`. The
recipe is read again at every checkpoint, so its later stages can be changed on the way.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitnet
import model
import numpy as np
import torch
from data import Batches, Stage, read_recipe
from evaluate import bits_per_byte, recall
from model import ChunkedCrossEntropy
from optimizer import make_optimizers
from prepare import prepare
from recall import RecallTask
from tokenizer import save_tokenizer

ARCHITECTURES = {
    # name: (model, its sizes, what writes it, its recipe)
    "llama": (model.Llama, model.ModelConfig, model.save_model, "recipe.toml"),
    "bitnet": (bitnet.BitNet, bitnet.BitNetConfig, bitnet.save_bitnet, "recipe_bitnet.toml"),
}
ANSWER_WEIGHT = 0.5  # of the mean loss of the answers, beside the mean loss of all tokens


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        required=True,
        help="training text, .txt or .xz, UTF-8; \\f between documents",
    )
    add("--heldout", type=Path, required=True, help="text for validation, never trained on")
    add("--work", type=Path, required=True, help="folder for tokens, tokenizer and checkpoints")
    add(
        "--export", type=Path, help="folder to write the model to, for mlx-lm, with each checkpoint"
    )
    add("--architecture", choices=ARCHITECTURES, default="llama", help="default: %(default)s")
    add("--recipe", type=Path, help="the stages (default: those of the architecture)")
    add("--megabytes", type=float, help="read no more than this of --text")
    add("--device", default=default_device(), help="cpu, cuda or mps (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    add("--tokens-per-part", type=int, default=2048, help="of a batch, per CPU thread at a time")
    add("--tokens-per-step", type=int, default=8192, help="batch size (default: %(default)s)")
    add("--muon-lr", type=float, default=0.02, help="of the matrices (default: %(default)s)")
    add("--adam-lr", type=float, default=3e-3, help="of embedding and norms (default: %(default)s)")
    add("--warmup", type=int, default=60, help="steps (default: %(default)s)")
    add("--validate-every", type=int, default=200, help="steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    for name, size in vars(model.ModelConfig()).items():
        if isinstance(size, int):
            flag = "--" + name.replace("_", "-")
            add(flag, type=int, help="model size (default: the architecture's)")
    arguments = parser.parse_args()
    if arguments.recipe is None:
        arguments.recipe = Path(__file__).with_name(ARCHITECTURES[arguments.architecture][3])
    return arguments


def default_device() -> str:
    """The fastest device there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def current_stage(stages: list[Stage], seen: float) -> tuple[Stage | None, float]:
    """The stage after `seen` tokens and how far it is, 0 to 1; None when all are done."""
    for stage in stages:
        if seen < stage.tokens * 1e6:
            return stage, seen / (stage.tokens * 1e6)
        seen -= stage.tokens * 1e6
    return None, 1.0


class Trainer:
    """Model, optimizers and progress: what a checkpoint holds."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = arguments.device
        architecture, config, self.write, _ = ARCHITECTURES[arguments.architecture]
        given = {k: getattr(arguments, k, None) for k in vars(config())}
        sizes = {k: size for k, size in given.items() if size is not None}
        self.model = architecture(config(**sizes)).to(self.device)
        self.rates = [arguments.muon_lr, arguments.adam_lr]
        self.parameters = list(self.model.parameters())
        self.workers = None
        if self.device == "cpu" and arguments.threads > 1:
            # One thread per part of the batch, not per operation: they wait for each other once a
            # step, and not a thousand times, which matters most when the machine has other work.
            torch.set_num_threads(1)
            self.workers = ThreadPoolExecutor(
                arguments.threads, initializer=torch.set_num_threads, initargs=(1,)
            )
        self.optimizers = make_optimizers(
            self.model, *self.rates, map=self.workers.map if self.workers else map
        )
        self.tokens_per_part = arguments.tokens_per_part
        self.step, self.seen, self.seconds = 0, 0.0, 0.0
        self.path = arguments.work / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint; the one before stays whole until the new one is."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": (self.step, self.seen, self.seconds),
        }
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.path, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seen, self.seconds = state["progress"]

    def train_step(self, batch, factor: float) -> tuple[float, float, float]:
        """One step; returns the loss of the prose, the loss of the answers and their recall."""
        ids, silent, answers = (torch.from_numpy(x).to(self.device) for x in batch)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        weights = (~silent).float()  # told values are random: nothing to learn there
        weights /= weights.sum()
        weights += ANSWER_WEIGHT * answers / answers.sum().clamp_min(1)
        rows = max(1, self.tokens_per_part // silent.shape[1]) if self.workers else len(ids)
        parts = list(zip(ids.split(rows), weights.split(rows), strict=True))
        results = list(
            self.workers.map(self.gradients, parts) if self.workers else map(self.gradients, parts)
        )
        for parameter, *grads in zip(
            self.parameters, *(grads for grads, _ in results), strict=True
        ):
            parameter.grad = sum(grads[1:], start=grads[0])
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        each, plain = torch.cat([losses for _, losses in results]), ~(silent | answers)
        known = (each[answers] < 0.693).float()  # the answer has more than half the probability
        self.step, self.seen = self.step + 1, self.seen + silent.numel()
        return each[plain].mean().item(), each[answers].mean().item(), known.mean().item()

    def gradients(self, part) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Of some rows of a batch: the gradient of every parameter, and the loss of every token."""
        ids, weights = part
        with torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=False):
            hidden = self.model.hidden(ids[:, :-1]).flatten(0, 1)
        loss, each = ChunkedCrossEntropy.apply(
            hidden,
            self.model.embed_tokens.weight,
            ids[:, 1:].flatten(),
            weights.flatten(),
            torch.bfloat16,
        )
        return torch.autograd.grad(loss, self.parameters), each.view(weights.shape)

    def validate(self, tokenizer, heldout, task) -> str:
        """A line with bits per byte and recall on held-out text; a sample of it, to be quick."""
        if self.workers:
            torch.set_num_threads(os.cpu_count())
        bits = bits_per_byte(self.model, tokenizer, heldout, window=1024, windows=40)
        scores = []
        for template in ("direct", "password"):
            for length, facts, answers in ((256, 4, 64), (1024, 10, 40), (2048, 1, 12)):
                score = recall(self.model, task, heldout, length, facts, answers, template)
                scores.append(f"{template} {length}: {score:.2f}")
        if self.workers:
            torch.set_num_threads(1)
        return f"validation: {bits:.4f} bits per byte, recall {', '.join(scores)}"


def main() -> None:
    """Train stage by stage, with a line every 20 steps and checkpoints in between."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    tokenizer, tokens, heldout = prepare(
        arguments.work,
        arguments.text,
        arguments.heldout,
        arguments.megabytes,
        arguments.vocab_size or model.ModelConfig.vocab_size,
    )
    batches = Batches(tokenizer, tokens, arguments.tokens_per_step, arguments.seed)
    task = RecallTask(lambda text: tokenizer.encode(text).ids)
    trainer = Trainer(arguments)
    if trainer.path.exists():
        trainer.load()
    stages = read_recipe(arguments.recipe)
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(
        f"{parameters:.2f} M parameters, {len(tokens) / 1e6:.1f} M tokens of text, "
        f"{len(task.words)} words, from step {trainer.step} on {arguments.device}",
        flush=True,
    )

    def checkpoint() -> None:
        trainer.save()
        if arguments.export:
            trainer.write(trainer.model, arguments.export)
            save_tokenizer(tokenizer, arguments.export)
        print(trainer.validate(tokenizer, heldout, task), flush=True)

    means, began, seen_before = [], time.time(), trainer.seen
    while (stage := current_stage(stages, trainer.seen))[0] is not None:
        stage, done = stage
        factor = stage.lr[0] + (stage.lr[1] - stage.lr[0]) * done
        factor *= min(1.0, (trainer.step + 1) / arguments.warmup)
        trainer.model.round_weights(stage.ternary)
        means.append(trainer.train_step(batches.draw(stage, trainer.step), factor))
        if trainer.step % 20 == 0:
            elapsed = time.time() - began
            trainer.seconds += elapsed
            plain, answer, known = (
                np.nanmean(x) if not np.isnan(x).all() else np.nan for x in np.array(means).T
            )
            print(
                f"{stage.name} {done:4.0%} step {trainer.step} {trainer.seen / 1e6:.2f} M "
                f"{(trainer.seen - seen_before) / elapsed:.0f} tokens/s lr {factor:.3f} "
                f"loss {plain:.3f} answers {answer:.3f} recall {known:.3f}",
                flush=True,
            )
            means, began, seen_before = [], time.time(), trainer.seen
        if trainer.step % arguments.validate_every == 0:
            checkpoint()
            stages = read_recipe(arguments.recipe)
            began, seen_before = time.time(), trainer.seen
    checkpoint()


if __name__ == "__main__":
    main()
