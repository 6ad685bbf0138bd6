"""Prefill of long prompts, measured: time, loss and recall of stock, exact and tile attention.

    OPENBLAS_NUM_THREADS=1 python examples/prefill_results.py docs/results/prefill.jsonl
    python examples/prefill_results.py docs/results/prefill.jsonl --parts speed --models smollm2 \
        --tokens 8192 --rounds 1
    python examples/prefill_results.py docs/results/prefill.jsonl --show

Each measurement is a line of the file as soon as it is made, and lines that are there are not
measured again: run the command anew until it has nothing to do. ``--show`` prints the tables,
``--page docs/results.md`` puts them there, and ``python -m mlx_delta.pictures prefill
docs/results/prefill.jsonl -o docs/pictures/prefill`` draws them.

Ways: ``stock`` is mlx-lm's own model with float32 weights; ``exact`` ours with a dense cache;
``tiles:0.95`` ours with full keys and prefill by tiles. All use one BLAS, and take turns, a prompt
in chunks as mlx-lm cuts it, whose end is known. A model may be cut to its first layers, where
whole ones take too long: ``smollm2[:6]``. Parts:

- speed: seconds by the clock and of the processor (what can be compared on a busy machine), and
  the most memory that MLX took beside the weights.
- loss: KL divergence of the next token from exact prefill, in the prompt's last 128 positions and
  in 128 that follow it, which attend exactly.
- recall: facts in a book, asked for at its end (as ``mlx_delta.evaluate``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
import numpy as np
from mlx_lm.utils import dequantize_model, load_model

from mlx_delta import load
from mlx_delta.evaluate.recall import RecallOptions, RecallTask, measure_sample
from mlx_delta.loading import find_model
from mlx_delta.measure.prefill_file import Row, read_rows, tables
from mlx_delta.measure.settings import PREFILL_STEP, Setting, parse_setting
from mlx_delta.measure.sparsity import measure_density
from mlx_delta.measure.text import BUNDLED_TEXT, context_length, read_text
from mlx_delta.system.cli import run_command
from mlx_delta.system.devices import has_gpu

MARKS = ("<!-- prefill -->", "<!-- end of prefill -->")
END = AFTER = 128  # positions scored at a prompt's end, and after it
FACTS = 60  # in a sample for recall
# Tokens between a fact and its question, by length; one of a distance in each sample.
DISTANCES = {
    2048: (256, 512, 1024, 1900),
    4096: (512, 1024, 2048, 3800),
    8192: tuple(range(650, 7511, 140)),
    16384: tuple(range(1300, 15301, 500)),
}
SAMPLES = {2048: 4, 4096: 4, 8192: 1, 16384: 1}


def parted(name: str) -> tuple[str, int | None]:
    """A model's name, and how many of its layers."""
    path, _, layers = name.removesuffix("]").partition("[:")
    return path, int(layers) if layers else None


@cache
def ours(name: str) -> tuple[Any, Any]:
    """The model with a dense cache, and its tokenizer."""
    path, layers = parted(name)
    model, tokenizer = load(path, None)
    model.model.layers = model.model.layers[:layers]
    return model, tokenizer


@cache
def stock(name: str) -> Any:
    """mlx-lm's model, with float32 weights where there is no GPU, as ours has there."""
    path, layers = parted(name)
    model, _ = load_model(find_model(path))
    model.model.layers = model.model.layers[:layers]
    if not has_gpu():
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


@cache
def book(name: str) -> list[int]:
    """The bundled book as tokens."""
    return ours(name)[1].encode(read_text(BUNDLED_TEXT), add_special_tokens=False)


def setting_of(way: str) -> Setting:
    """How a way keeps keys: full ones, densely or with tiles chosen."""
    if way in ("stock", "exact"):
        return parse_setting("dense")
    return parse_setting(f"delta:threshold=0.0,tiles={way.removeprefix('tiles:')}")


def speed(name: str, tokens: int, way: str, number: int) -> dict[str, Any]:
    """Time one prefill; ``number`` counts rounds."""
    model = stock(name) if way == "stock" else ours(name)[0]
    setting, ids = setting_of(way), book(name)[:tokens]
    caches = setting.make_caches(model, tokens)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    clock, processor = time.perf_counter(), time.process_time()
    mx.eval(setting.prefill(model, ids, caches))
    seconds, work = time.perf_counter() - clock, time.process_time() - processor
    return {
        "seconds": round(seconds, 3),
        "processor_seconds": round(work, 3),
        "peak_bytes": mx.get_peak_memory() - before,
        "density": measure_density(caches),
    }


def log_probabilities(name: str, way: str, tokens: int, start: int) -> tuple[Any, Any, Any]:
    """Of the prompt's last positions, and of those after it; and the density."""
    model, setting = ours(name)[0], setting_of(way)
    ids = book(name)[start : start + tokens + AFTER]
    caches = setting.make_caches(model, tokens)
    for first in range(0, tokens, PREFILL_STEP):
        last = min(first + PREFILL_STEP, tokens)
        hidden = model.model(mx.array(ids[first:last])[None], cache=caches)
        mx.eval(hidden, [c.state for c in caches])
    end = _logs(model, hidden[:, -END:])
    after = []
    for first in range(tokens, tokens + AFTER, 16):  # few at a time attend to all tiles
        hidden = model.model(mx.array(ids[first : first + 16])[None], cache=caches)
        after.append(_logs(model, hidden))
    return end, np.concatenate(after), measure_density(caches)


def _logs(model: Any, hidden: mx.array) -> np.ndarray:
    tied = model.args.tie_word_embeddings
    logits = model.model.embed_tokens.as_linear(hidden) if tied else model.lm_head(hidden)
    logits = logits.astype(mx.float32)
    return np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0])


@cache
def exact_logs(name: str, tokens: int, start: int) -> tuple[Any, Any]:
    """The same of exact prefill."""
    end, after, _ = log_probabilities(name, "exact", tokens, start)
    return end, after


def loss(name: str, tokens: int, way: str, number: int) -> dict[str, Any]:
    """KL divergence from exact prefill; ``number`` counts windows of the book."""
    start = number * (tokens + AFTER)
    values: dict[str, Any] = {}
    *found, values["density"] = log_probabilities(name, way, tokens, start)
    exact = exact_logs(name, tokens, start)
    for what, ours_, others in zip(("end", "after"), exact, found, strict=True):
        divergence = (np.exp(ours_) * (ours_ - others)).sum(axis=-1)
        values[f"{what}_kl"] = float(f"{divergence.mean():.4g}")
        values[f"{what}_flips"] = round(float((ours_.argmax(-1) != others.argmax(-1)).mean()), 4)
    return values


def recall(name: str, tokens: int, way: str, number: int) -> dict[str, Any]:
    """Answers that are right; ``number`` counts samples."""
    model, tokenizer = ours(name)
    facts = min(FACTS, tokens // 112)
    options = RecallOptions(
        answers=number + 1,
        distances=DISTANCES[tokens],
        templates=("password",),
        length=tokens,
        facts=max(facts, len(DISTANCES[tokens])),
    )
    task = RecallTask(tokenizer, read_text(BUNDLED_TEXT), options, context_length(model))
    found = measure_sample(model, setting_of(way), task, "password", number)
    return {"right": found["right"]}


PARTS: dict[str, Callable[[str, int, str, int], dict[str, Any]]] = {
    "speed": speed,
    "loss": loss,
    "recall": recall,
}
LENGTHS = {"smollm2": (1024, 2048, 4096, 8192), "demo": (1024, 2048, 4096, 8192, 16384)}


def wanted(args: argparse.Namespace) -> Iterator[Row]:
    """What is to be measured, shortest first."""
    for part in args.parts:
        for name in args.models:
            for tokens in args.tokens or LENGTHS.get(parted(name)[0], (2048,)):
                if part == "recall" and tokens not in DISTANCES:
                    continue
                count = args.rounds
                count = min(count, SAMPLES[tokens]) if part == "recall" else count
                for number in range(count):
                    for way in ("stock", "exact", *(f"tiles:{share}" for share in args.tiles)):
                        if (way != "stock" or part == "speed") and (part, way) != ("loss", "exact"):
                            yield Row(part, name, tokens, way, number, {})


def measure(args: argparse.Namespace) -> None:
    """Measure what is not in the file yet."""
    done = {row.key for row in read_rows(args.file)} if args.file.exists() else set()
    for row in wanted(args):
        if row.key in done:
            continue
        row.values.update(PARTS[row.part](row.model, row.tokens, row.way, row.number))
        row.values["date"] = datetime.date.today().isoformat()
        line = json.dumps(row.to_dict())
        with args.file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line, flush=True)


def write_page(page: Path, text: str) -> None:
    """Put the tables between the marks of a page."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise ValueError(f"{page} has no {MARKS[0]} and {MARKS[1]}; put them where tables belong.")
    page.write_text(f"{before}{mark}\n{text}\n{end}{after}", encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Measure, or show what was measured."""
    if not args.show and args.page is None:
        measure(args)
        return
    text = "\n\n".join(table.markdown() for table in tables(read_rows(args.file)))
    if args.page is not None:
        write_page(args.page, text)
    if args.show:
        print(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, help="one line for each measurement")
    add("--show", action="store_true", help="print the tables, measure nothing")
    add("--page", type=Path, help="put the tables into this page, measure nothing")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--models", nargs="+", default=list(LENGTHS), help="default: smollm2 demo")
    add("--tokens", type=int, nargs="+", help="of the prompt")
    add("--tiles", type=float, nargs="+", default=[0.95], help="shares to compute")
    add("--rounds", type=int, default=1, help="of speed; of windows and samples of the others")
    args = parser.parse_args(argv)
    return run_command(
        lambda: run(args), "measure shorter prompts", "Interrupted; the same command goes on."
    )


if __name__ == "__main__":
    sys.exit(main())
