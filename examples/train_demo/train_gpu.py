"""Train the Llama demo model on one GPU, by the clock. See README.md.

    python train_gpu.py --text books.txt --heldout other.txt --work run --export demo

The training ends by itself once `--seconds` are over; what is encoded and compiled at first counts.
The stages stand in recipe_gpu.toml.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from data import Batches, read_recipe
from drawing import ANSWER, SILENT, Drawers
from evaluate import bits_per_byte, recall
from flat import FlatLlama
from model import ModelConfig, save_model
from optimizer import make_optimizers
from prepare import prepare
from recall import RecallTask
from schedule import Schedule, TimedStage, learning_rate
from tokenizer import save_tokenizer

START = time.time()
SIZES = ModelConfig(
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    intermediate_size=1024,
    rope_theta=500000.0,
    max_position_embeddings=16384,
)
# Facts in a sequence that is asked about, by its length, for the evaluation.
FACTS = {256: 4, 512: 8, 1024: 15, 2048: 20, 4096: 30, 8192: 40, 16384: 60}
KNOWN = math.log(2)  # an answer whose loss is lower has more than half the probability


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    path = {"type": Path, "required": True}
    add("--text", **path, help="training text, .txt or .xz, UTF-8; \\f between documents")
    add("--heldout", **path, help="text for validation, never trained on")
    add("--work", **path, help="folder for tokens and tokenizer")
    add("--export", **path, help="folder to write the model to, for mlx-lm")
    add("--recipe", type=Path, default=Path(__file__).with_name("recipe_gpu.toml"))
    add("--seconds", type=float, default=330, help="for all of it (default: %(default)s)")
    add("--reserve", type=float, default=12, help="of them for the end (default: %(default)s)")
    add("--megabytes", type=float, help="read no more than this of --text")
    add("--device", default="cuda", help="cuda, or cpu for trials (default: %(default)s)")
    add("--no-compile", action="store_true", help="compile nothing, for trials")
    add("--tokens-per-step", type=int, default=131072, help="batch size (default: %(default)s)")
    add("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that draw")
    add("--ahead", type=int, default=48, help="batches drawn ahead (default: %(default)s)")
    add("--muon-lr", type=float, default=0.02, help="of the matrices (default: %(default)s)")
    add("--adam-lr", type=float, default=3e-3, help="of embedding and norms (default: %(default)s)")
    add("--weight-decay", type=float, default=0.1, help="of the matrices (default: %(default)s)")
    add("--warmup", type=int, default=100, help="steps (default: %(default)s)")
    add("--decay-from", type=float, default=0.5, help="share of the time (default: %(default)s)")
    add("--answer-weight", type=float, default=0.5, help="of the mean loss of the answers, beside")
    add("--print-every", type=float, default=3, help="seconds (default: %(default)s)")
    add("--validate-every", type=float, default=30, help="seconds (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    for name, size in vars(SIZES).items():
        if isinstance(size, int):
            flag = "--" + name.replace("_", "-")
            add(flag, type=int, default=size, help="model size (default: %(default)s)")
    return parser.parse_args()


def log(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.time() - START:6.1f}] {text}", flush=True)


class Trainer:
    """Model, optimizers, and what was counted since the last line."""

    def __init__(self, arguments: argparse.Namespace, lengths: list[int]):
        self.device = torch.device(arguments.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = True
            # The other kernels would crawl, unnoticed: an error is better.
            torch.backends.cuda.enable_math_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
        sizes = {k: getattr(arguments, k, v) for k, v in vars(SIZES).items()}
        kind = torch.bfloat16 if on_gpu else torch.float32
        self.model = FlatLlama(ModelConfig(**sizes), kind).to(self.device)
        if not arguments.no_compile:
            self.model.compile_parts()
        self.rates = [arguments.muon_lr, arguments.adam_lr]
        self.optimizers = make_optimizers(
            self.model, *self.rates, weight_decay=arguments.weight_decay, stacked=True
        )
        self.answer_weight = arguments.answer_weight
        self.step, self.seen = 0, 0
        # Sums stay on the GPU until a line is printed: to read one would wait for the step.
        self.sums = torch.zeros(4, device=self.device)  # loss of prose, targets; of answers, same
        self.known = {n: torch.zeros(2, device=self.device) for n in lengths}

    def train_step(self, ids: np.ndarray, mask: np.ndarray, factor: float) -> None:
        """One step on ids and mask [B, T + 1]."""
        # Copied first: the memory they lie in is drawn into again.
        batch = torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(mask.copy())
        if self.device.type == "cuda":  # from other memory, a copy would wait for the last step
            batch = [x.pin_memory() for x in batch]
        ids, mask = (x.to(self.device, non_blocking=True) for x in batch)
        ids, silent, answers = ids.long(), mask[:, 1:] == SILENT, mask[:, 1:] == ANSWER
        weights = (~silent).float()
        weights /= weights.sum()
        count = answers.sum()
        weights += self.answer_weight * answers / count.clamp_min(1)
        loss, each = self.model.losses(ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        plain, of_answers = ~(silent | answers), each * answers
        self.sums += torch.stack([(each * plain).sum(), plain.sum(), of_answers.sum(), count])
        self.known[silent.shape[1]] += torch.stack([(answers & (each < KNOWN)).sum(), count])
        self.step, self.seen = self.step + 1, self.seen + silent.numel()

    def take_counts(self, recall: dict[int, float]) -> tuple[float, float]:
        """The mean losses of prose and answers since the last call; `recall` is brought up to date.

        Raises:
            FloatingPointError: Training has failed.
        """
        prose, targets, answers, count = self.sums.tolist()
        if not math.isfinite(prose + answers):
            raise FloatingPointError(f"the loss is {prose + answers}: lower --muon-lr, --adam-lr")
        self.sums.zero_()
        for length, sums in self.known.items():
            hits, total = sums.tolist()
            if total:
                recall[length] = hits / total
            sums.zero_()
        return prose / max(1, targets), answers / max(1, count)

    def validate(self, tokenizer, heldout: np.ndarray, lengths: list[int]) -> str:
        """A line with bits per byte and recall on held-out text, at every length."""
        task = RecallTask(lambda text: tokenizer.encode(text).ids)
        autocast = self.device.type == "cuda"
        window = min(2048, lengths[-1])
        bits = bits_per_byte(self.model, tokenizer, heldout, window, 64, autocast)
        scores = []
        for length in lengths:
            facts = FACTS.get(length, max(1, length // 64))
            for template in ("direct", "password"):
                score = recall(
                    self.model, task, heldout, length, facts, 120, template, autocast=autocast
                )
                scores.append(f"{template} {length}: {score:.3f}")
        return f"validation: {bits:.4f} bits per byte, recall {', '.join(scores)}"


def main() -> None:
    """Train stage by stage until the time is over, then write the model and validate it."""
    arguments = parse_arguments()
    tokenizer, tokens, heldout = prepare(
        arguments.work,
        arguments.text,
        arguments.heldout,
        arguments.megabytes,
        arguments.vocab_size,
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it does not go with the forks that follow
    longest = arguments.max_position_embeddings
    schedule = Schedule(read_recipe(arguments.recipe, TimedStage), longest)
    batches = Batches(tokenizer, tokens, arguments.tokens_per_step, arguments.seed)
    drawers = Drawers(batches, schedule.stages, longest, arguments.processes, 2 * arguments.ahead)
    try:
        drawers.order(schedule.index, arguments.ahead)  # they begin while CUDA starts
        torch.manual_seed(arguments.seed)
        trainer = Trainer(arguments, schedule.lengths)
        parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        log(
            f"{parameters:.2f} M parameters, {len(tokens) / 1e6:.1f} M tokens of text, "
            f"on {trainer.device} with {arguments.processes} processes drawing"
        )
        train(arguments, trainer, schedule, drawers, tokenizer, heldout)
    finally:
        drawers.stop()
    save_model(trainer.model, arguments.export)
    save_tokenizer(tokenizer, arguments.export, longest)
    log(f"trained {trainer.step} steps, {trainer.seen / 1e6:.1f} M tokens; exported")
    log(trainer.validate(tokenizer, heldout, schedule.lengths))


def train(arguments, trainer: Trainer, schedule: Schedule, drawers: Drawers, tokenizer, heldout):
    """Steps until the time is over, with a line every few seconds."""
    recall: dict[int, float] = {}
    end, began = START + arguments.seconds - arguments.reserve, None
    printed, validated, seen = time.time(), time.time(), 0
    while True:
        now = time.time()
        # The time counts from the end of the first step, which compiles.
        done = 0.0 if began is None else (now - began) / max(1e-9, end - began)
        if done >= 1.0:
            return
        drawers.order(schedule.index, arguments.ahead)
        factor = learning_rate(trainer.step, done, arguments.warmup, arguments.decay_from)
        with drawers.batch() as (ids, mask):
            trainer.train_step(ids, mask, factor)
        if began is None:
            trainer.take_counts({})  # waits for the step
            began = printed = validated = time.time()
            seen = trainer.seen
            log(f"first step: {end - began:.0f} s to train in")
        now = time.time()
        if now - printed > arguments.print_every:
            prose, answers = trainer.take_counts(recall)
            now = time.time()
            speed = (trainer.seen - seen) / (now - printed) / 1e6
            known = " ".join(f"{length}: {share:.2f}" for length, share in sorted(recall.items()))
            log(
                f"{schedule.stage.name} {done:4.0%} step {trainer.step} {trainer.seen / 1e6:.1f} M "
                f"{speed:.3f} M/s lr {factor:.3f} loss {prose:.3f} answers {answers:.3f} "
                f"recall {known}"
            )
            printed, seen = now, trainer.seen
            if schedule.advance(done, recall):
                recall.clear()
                log(f"stage {schedule.stage.name}")
        if now - validated > arguments.validate_every:
            log(trainer.validate(tokenizer, heldout, schedule.lengths))
            validated = time.time()
            printed += validated - now  # its time is none of training


if __name__ == "__main__":
    main()
