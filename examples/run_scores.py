"""Does skipping the deltas that are zero make scores faster on a CPU? Counted and timed.

    python examples/run_scores.py --model smollm2 --tokens 2048

Held keys are constant along runs, in the sequence in which a block's tokens are held, so a score
needs only the deltas that are not zero (the paper's recurrence). Counted: the part of a block's
deltas that is left, and how many of its 64 rows are distinct when only a group of neighbouring
channels is looked at: a group could be computed once for equal rows. Timed, on one core: scores of
192 queries (three heads, 64 queries each) with a block's keys as a matrix product (NumPy's BLAS)
and along the deltas, by ``run_scores.c``, which needs a C compiler. Building the lists of deltas is
not timed: it is done once for each block.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: one core for both

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
import numpy as np

from mlx_delta import DeltaConfig, load
from mlx_delta.attention.hybrid import attend_to_step
from mlx_delta.cache import HeldKeys
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.method.attention import text_sequence

GROUPS = (1, 4, 8, 16, 32, 64)
LANES, CHUNKS, BATCH = 64, 3, 16


def held_blocks(args: argparse.Namespace) -> np.ndarray:
    """Held keys of all far blocks, [layers, kv heads, blocks, T, D]."""
    if args.level is None:
        model, tokenizer = load(args.model)
    else:
        model, tokenizer = load(args.model, DeltaConfig(level=args.level))
    setting = model.args.delta
    text = tokenizer.encode(read_text(args.text), add_special_tokens=False)[: args.tokens]
    caches = model.make_cache()
    seen: list[list[mx.array]] = [[] for _ in caches]
    for cache, keys in zip(caches, seen, strict=True):
        cache.attend = look_on(cache, keys)
    mx.eval(model.model(mx.array(text)[None], cache=caches))
    size, blocks = setting.block_size, args.tokens // setting.block_size - setting.window_blocks - 1
    found = []
    for cache, keys in zip(caches, seen, strict=True):
        of_layer = np.array(mx.concatenate(keys, axis=2)[0].astype(mx.float32))
        held = np.array(cache.keys_and_values()[0][0].astype(mx.float32))
        for head, (own, means) in enumerate(zip(of_layer, held, strict=True)):
            sequence = text_sequence(own[: blocks * size], cache.config.for_head(head))
            found.append(means[sequence])
    return np.stack(found).reshape(len(caches), -1, blocks, size, held.shape[2])


def look_on(cache: HeldKeys, keys: list[mx.array]) -> Callable[..., mx.array]:
    """Attention over a cache that leaves behind which keys come."""

    def attend(queries: mx.array, new: mx.array, values: mx.array, scale: float) -> mx.array:
        keys.append(new)
        return attend_to_step(queries, cache.update(new, values), scale)

    return attend


def deltas_of(blocks: np.ndarray) -> np.ndarray:
    """Each block's first row, and every other row less the one before, in the sequence."""
    return np.concatenate([blocks[..., :1, :], np.diff(blocks, axis=-2)], axis=-2)


def print_counts(blocks: np.ndarray) -> None:
    """Print what is left of the deltas, and distinct rows by groups of channels."""
    changed = deltas_of(blocks) != 0
    changed[..., 0, :] = True
    layers = changed.mean(axis=(1, 2, 3, 4))
    print(
        f"deltas not zero: {changed.mean():.3f} (layers from {layers.min():.3f} to "
        f"{layers.max():.3f})"
    )
    for group in GROUPS:
        *shape, D = changed.shape
        distinct = changed.reshape(*shape, D // group, group).any(axis=-1).sum(axis=-2)
        print(f"distinct rows of {shape[-1]}, {group:2d} channels together: {distinct.mean():5.1f}")


def compiled() -> ctypes.CDLL:
    """``run_scores.c`` for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "run_scores.so")
        source = Path(__file__).with_suffix(".c")
        command = ["gcc", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


def best(call: object, repeats: int = 60) -> float:
    """The least processor seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time_ns()
        call()
        times.append(time.process_time_ns() - start)
    return min(times) * 1e-9


def print_times(blocks: np.ndarray) -> None:
    """Print times of a batch of blocks, as a product and along the deltas."""
    library = compiled()
    T, D = blocks.shape[-2:]
    flat = blocks.reshape(-1, T, D)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(CHUNKS, D, LANES)).astype(np.float32)
    rows = np.ascontiguousarray(queries.swapaxes(1, 2).reshape(-1, D))
    pick = rng.choice(len(flat), BATCH, replace=False)
    keys = np.ascontiguousarray(flat[pick].reshape(BATCH * T, D))
    product = np.empty((CHUNKS * LANES, BATCH * T), np.float32)
    dense = best(lambda: np.matmul(rows, keys.T, out=product))
    lists, left = [], 0
    for block in deltas_of(flat[pick]):
        t, channels = np.nonzero(block)
        begins = np.searchsorted(t, np.arange(T + 1)).astype(np.int32)
        lists.append((begins, channels.astype(np.int32), block[t, channels]))
        left += len(t)
    scores = np.empty((BATCH, CHUNKS, T, LANES), np.float32)
    arguments = [
        [x.ctypes.data_as(ctypes.c_void_p) for x in (queries, *part, scores[i])]
        for i, part in enumerate(lists)
    ]

    def along() -> None:
        for part in arguments:
            library.run_scores(CHUNKS, D, T, *part)

    runs = best(along)
    found = scores.transpose(1, 3, 0, 2).reshape(CHUNKS * LANES, -1)
    error = np.abs(found - product).max() / np.abs(product).max()
    pairs = product.size
    print(f"{CHUNKS * LANES} queries, {BATCH} blocks, deltas not zero {left / keys.size:.3f}:")
    print(f"  matrix product    {dense / pairs * 1e9:6.2f} ns a score")
    print(f"  along the deltas  {runs / pairs * 1e9:6.2f} ns a score, {dense / runs:.2f} times as")
    print(f"                    fast; largest difference {error:.1e} of the largest score")


def main() -> None:
    """Count and time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="default: %(default)s")
    parser.add_argument("--text", default=BUNDLED_TEXT, help="default: the bundled book")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text")
    parser.add_argument("--level", type=float, help="of the hold; default: the model's own")
    args = parser.parse_args()
    blocks = held_blocks(args)
    print_counts(blocks)
    print_times(blocks)


if __name__ == "__main__":
    main()
