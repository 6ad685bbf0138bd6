"""What packed storage takes and costs: the bytes of a cache, and what the demo model remembers.

    python examples/packed_figures.py bytes     # a cache at 8,192 tokens, against mlx-lm's
    python examples/packed_figures.py quality   # recall and bits per byte of the demo model

`bytes` fills caches of one layer with float16 keys of which a given share is held, and prints what
`nbytes` says, the window and room to grow included. `quality` runs the demo model with dense and
with packed caches on the same texts.
"""

from __future__ import annotations

import argparse
import dataclasses

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
import numpy as np
from demo_figures import TEXT, bits_per_byte, read_text
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from train_demo.recall import RecallTask

from mlx_delta import DeltaConfig, DeltaKVCache, load

HEADS, HEAD_DIM, CHUNK = 2, 64, 2048
WIDTHS = [(None, None), (16, None), (16, 16), (8, 8), (4, 4), (3, 4), (2, 4)]


def keys_held(share: float, length: int) -> mx.array:
    """float16 keys [1, HEADS, length, HEAD_DIM] of which `share` of the deltas is zero.

    A value stays near its level, or jumps to the other side of zero, which is far more than the
    default threshold.
    """
    rng = np.random.default_rng(0)
    shape = (1, HEADS, length, HEAD_DIM)
    sides = np.cumsum(rng.random(shape) > share, axis=2) % 2 * 2 - 1
    return mx.array(sides * 2.0 + rng.normal(size=shape) * 0.1).astype(mx.float16)


def fill(cache: KVCache, keys: mx.array) -> None:
    """Feed keys, which are values too, in chunks as a prompt comes."""
    for start in range(0, keys.shape[2], CHUNK):
        part = keys[:, :, start : start + CHUNK]
        mx.eval(cache.update_and_fetch(part, part))


def bytes_table(args: argparse.Namespace) -> None:
    """Print bytes of keys and values of one layer, as shares of a dense float16 cache's."""
    keys = keys_held(args.share, args.tokens)
    dense = keys.nbytes
    print(f"{args.tokens} tokens, {HEADS} kv heads, head_dim {HEAD_DIM}; shares of dense float16")
    print("cache                          zero deltas   keys  values  together")
    for key_bits, value_bits in WIDTHS:
        cache = DeltaKVCache(DeltaConfig(key_bits=key_bits, value_bits=value_bits))
        fill(cache, keys)
        size = cache.config.block_size
        zeros = np.array(cache.zeros)[:, :, : cache._encoded[0]].mean() / ((size - 1) * HEAD_DIM)
        name = f"delta, key_bits={key_bits}, value_bits={value_bits}"
        _print_bytes(name, f"{zeros:.3f}", cache.key_nbytes / dense, cache.value_nbytes / dense)
    stock = [("mlx-lm, dense", KVCache())]
    stock += [(f"mlx-lm, {bits} bits", QuantizedKVCache(bits=bits)) for bits in (8, 4)]
    for name, cache in stock:
        fill(cache, keys)
        half = cache.nbytes / dense / 2
        _print_bytes(name, "-", half, half)


def _print_bytes(name: str, zeros: str, keys: float, values: float) -> None:
    print(f"{name:37s}  {zeros:>5s}  {keys:5.3f}  {values:6.3f}  {(keys + values) / 2:8.3f}")


def quality_table(args: argparse.Namespace) -> None:
    """Print recall and bits per byte for each way to store keys and values."""
    model, tokenizer = load(args.model)
    delta = model.args.delta or DeltaConfig()

    def caches(key_bits: int | None, value_bits: int | None) -> list[DeltaKVCache]:
        config = dataclasses.replace(delta, key_bits=key_bits, value_bits=value_bits)
        n_layers = len(model.layers)
        return [DeltaKVCache(config.for_layer(i, n_layers)) for i in range(n_layers)]

    ways = {"dense": lambda: [KVCache() for _ in model.layers]}
    for widths in ((None, None), (16, None), (4, 4), (2, 4)):
        ways["delta, key_bits={}, value_bits={}".format(*widths)] = lambda w=widths: caches(*w)

    prose = np.array(tokenizer.encode(read_text(args.text), add_special_tokens=False))
    task = RecallTask(lambda text: tokenizer.encode(text, add_special_tokens=False))
    rng = np.random.default_rng(args.tokens)
    samples = []
    while sum(len(sample.answers) for sample in samples) < args.answers:
        sample = task.sample(
            rng, args.tokens, args.facts, prose=prose, told_until=0.5, asked_from=0.75
        )
        samples += [sample] if sample is not None else []
    starts = range(0, len(prose) - args.tokens, args.tokens)
    windows = [prose[start : start + args.tokens + 1].tolist() for start in starts][: args.windows]

    print(f"{args.tokens} tokens; {args.answers} answer tokens, {len(windows)} windows of prose")
    print("cache                                  recall  bits per byte")
    for name, make_caches in ways.items():
        hits: list[bool] = []
        for sample in samples:
            logits = model(mx.array(sample.ids)[None], cache=make_caches())[0]
            best = np.array(mx.argmax(logits[mx.array(sample.answers - 1)], axis=-1))
            hits += (best == sample.ids[sample.answers]).tolist()
        bits, _ = bits_per_byte(model, make_caches, windows, tokenizer)
        print(f"{name:37s}  {np.mean(hits):6.3f}  {bits:13.4f}", flush=True)


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    bytes_command = commands.add_parser("bytes", help="bytes of a cache")
    bytes_command.add_argument("--tokens", type=int, default=8192)
    bytes_command.add_argument("--share", type=float, default=0.655, help="of zero deltas")
    bytes_command.set_defaults(run=bytes_table)
    quality = commands.add_parser("quality", help="recall and bits per byte")
    quality.add_argument("--model", default="demo")
    quality.add_argument("--text", default=TEXT, help="prose, .txt or .xz (default: %(default)s)")
    quality.add_argument("--tokens", type=int, default=1024)
    quality.add_argument("--facts", type=int, default=16)
    quality.add_argument("--answers", type=int, default=200)
    quality.add_argument("--windows", type=int, default=20, help="of prose")
    quality.set_defaults(run=quality_table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
