"""What the bundled demo model remembers, and what the delta saves and costs, on this machine.

    python examples/demo_figures.py recall              # passwords asked for far from where told
    python examples/demo_figures.py prose --text FILE   # bits per byte of unseen text
    python examples/demo_figures.py speed               # against stock mlx-lm, alternating

Each prints one table. ``--model`` takes any model directory with the demo's tokenizer,
``--threshold`` another threshold of the delta.
"""

from __future__ import annotations

import argparse
import lzma
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import load_model
from tqdm import tqdm
from train_demo.recall import RecallTask

from mlx_delta import DeltaConfig, DeltaKVCache, load, measure_sparsity
from mlx_delta.evaluate import BUNDLED_TEXT as TEXT
from mlx_delta.loading import find_model, has_gpu

LENGTHS = (512, 1024, 2048)
FACTS = 20


class FarKeysDropped(DeltaKVCache):
    """Shows what the held keys are worth: the same exact pairs, and nothing else is seen."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Causal, and near or a sink."""
        config = self.config
        query = mx.arange(self.offset, self.offset + N)[:, None]
        key = mx.arange(self.offset + N)[None]
        near = key // config.block_size >= query // config.block_size - config.window_blocks
        return create_causal_mask(N, self.offset) & (near | (key < config.sinks))


def settings(model: Any) -> dict[str, Callable[[], list[Any]]]:
    """How to make a model's caches for each setting; a dense cache makes the model dense."""
    delta = model.args.delta
    return {
        "dense": lambda: [KVCache() for _ in model.layers],
        "delta": model.make_cache,
        "far keys dropped": lambda: [FarKeysDropped(delta) for _ in model.layers],
    }


def read_text(file: str | Path) -> str:
    """A text file, or one compressed with xz."""
    if str(file).endswith(".xz"):
        return lzma.open(file, "rt", encoding="utf-8").read()
    return Path(file).read_text(encoding="utf-8")


def measure_recall(
    model: Any, tokenizer: Any, prose: np.ndarray, length: int, answers: int, template: str
) -> dict[str, tuple[float, int, float]]:
    """Share of answer tokens ranked first, their number, and prefill sparsity, per setting.

    Facts stand in the first half of the text and are asked for in its last quarter.
    """
    task = RecallTask(lambda text: tokenizer.encode(text, add_special_tokens=False))
    rng = np.random.default_rng(length)
    samples: list[Any] = []
    while sum(len(s.answers) for s in samples) < answers:
        facts = min(FACTS, length // 64)
        sample = task.sample(
            rng, length, facts, prose=prose, templates=[template], told_until=0.5, asked_from=0.75
        )
        if sample is not None:
            samples.append(sample)
    results = {}
    for name, make_caches in settings(model).items():
        hits: list[bool] = []
        for sample in tqdm(samples, desc=f"{length} tokens, {name}", leave=False):
            caches = make_caches()
            logits = model(mx.array(sample.ids)[None], cache=caches)[0]
            best = np.array(mx.argmax(logits[mx.array(sample.answers - 1)], axis=-1))
            hits += (best == sample.ids[sample.answers]).tolist()
        sparsity = measure_sparsity(caches, length).prefill if name == "delta" else 0.0
        results[name] = (float(np.mean(hits)), len(hits), sparsity)
    return results


def recall_table(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Print recall for each length, template and setting."""
    prose = np.array(tokenizer.encode(read_text(args.text), add_special_tokens=False))
    print("tokens  asked by   setting            recall  answers  prefill sparsity")
    for length in args.lengths:
        for template in args.templates:
            measured = measure_recall(model, tokenizer, prose, length, args.answers, template)
            for name, (recall, answers, sparsity) in measured.items():
                print(
                    f"{length:6d}  {template:9s}  {name:17s}  {recall:6.3f}  {answers:7d}  "
                    f"{sparsity:16.3f}"
                )


def bits_per_byte(
    model: Any, make_caches: Callable[[], list[Any]], windows: list[list[int]], tokenizer: Any
) -> tuple[float, float]:
    """Bits per byte of windows of token ids, and the prefill sparsity of the last one.

    Windows share no context; a window's first token is not predicted, its bytes not counted.
    """
    nats, size = 0.0, 0
    for ids in tqdm(windows, leave=False):
        caches = make_caches()
        logits = model(mx.array(ids[:-1])[None], cache=caches)[0]
        chosen = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
        nats += (mx.logsumexp(logits, axis=-1) - chosen).sum().item()
        size += len(tokenizer.decode(ids[1:]).encode())
    return nats / math.log(2) / size, measure_sparsity(caches, len(ids) - 1).prefill


def prose_table(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Print bits per byte for each setting."""
    length = max(args.lengths)
    ids: list[int] = []
    for document in read_text(args.text).split("\f"):
        ids += tokenizer.encode(document, add_special_tokens=False)
    windows = [ids[i : i + length + 1] for i in range(0, len(ids) - length, length)][:: args.every]
    print(f"{len(windows)} windows of {length} tokens\nsetting            bits per byte  sparsity")
    for name, make_caches in settings(model).items():
        bits, sparsity = bits_per_byte(model, make_caches, windows, tokenizer)
        print(f"{name:17s}  {bits:13.4f}  {sparsity:8.3f}")


def speed_table(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Print prefill and decode times against stock mlx-lm on the same weights, alternating."""
    length, steps = max(args.lengths) - 64, 64
    stock, _ = load_model(find_model(args.model))
    off, _ = load(args.model, None)
    if not has_gpu():
        stock.set_dtype(mx.float32)
    models = {"stock mlx-lm": stock, "delta off": off, "delta on": model}
    ids = tokenizer.encode(read_text(args.text), add_special_tokens=False)[: length + steps]
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    caches: dict[str, list[Any]] = {}
    for repeat in range(args.repeats + 1):  # the first round warms up
        for name, seconds in prefill.items():
            caches[name] = models[name].make_cache()
            seconds.append(_timed(models[name], ids[:length], caches[name]))
        for token in ids[length:]:
            for name, milliseconds in decode.items():
                milliseconds.append(1e3 * _timed(models[name], [token], caches[name]))
        if repeat == 0:
            prefill = {name: [] for name in models}
            decode = {name: [] for name in models}
    print(
        f"{length} tokens of prompt, {steps} decoded one by one, taking turns; "
        f"median (least) over {args.repeats} rounds"
    )
    print("setting         prefill s            x stock   decode ms            x stock")
    for name in models:
        cells = []
        for times in (prefill, decode):
            median, base = statistics.median(times[name]), statistics.median(times["stock mlx-lm"])
            cells.append(f"{median:8.3f} ({min(times[name]):8.3f})   {median / base:7.3f}")
        print(f"{name:14s}  {'   '.join(cells)}")


def _timed(model: Any, ids: list[int], caches: list[Any]) -> float:
    """Seconds that a model takes for these tokens."""
    start = time.perf_counter()
    mx.eval(model(mx.array(ids)[None], cache=caches))
    return time.perf_counter() - start


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("recall", "prose", "speed"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default=TEXT, help="prose, .txt or .xz (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="of the delta")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in tokens")
    parser.add_argument("--templates", nargs="+", default=["direct", "password"])
    parser.add_argument("--answers", type=int, default=300, help="answer tokens per line")
    parser.add_argument("--every", type=int, default=1, help="measure every Nth window of prose")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    if args.threshold is not None:
        model.args.delta = replace(model.args.delta or DeltaConfig(), threshold=args.threshold)
    {"recall": recall_table, "prose": prose_table, "speed": speed_table}[args.what](
        model, tokenizer, args
    )


if __name__ == "__main__":
    main()
