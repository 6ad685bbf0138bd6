"""What caches take: bytes of keys and values at 8,192 tokens, ours against mlx-lm's.

    python examples/cache_bytes.py

Fills caches of one layer with float16 keys of which a given share is held, and prints what
`nbytes` says, the window and room to grow included. What small caches cost in quality is for
`python -m mlx_delta.evaluate` to say.
"""

from __future__ import annotations

import argparse

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlx_delta import DeltaConfig, DeltaKVCache

HEADS, HEAD_DIM, CHUNK = 2, 64, 2048
FORMATS = [  # of key_format
    ("held", None, None),
    ("held", None, 16),
    *(("codes", 4, 4), ("codes", 3, 3), ("codes", 2.5, 2.5)),
    *(("deltas", 4, 4), ("deltas", 3.5, 3)),
]


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
    for kind, key_bits, value_bits in FORMATS:
        setting = DeltaConfig(key_format=kind, key_bits=key_bits, value_bits=value_bits)
        cache = DeltaKVCache(setting)
        fill(cache, keys)
        zeros = "-"
        if kind != "codes":
            of_block = (setting.block_size - 1) * HEAD_DIM
            share = np.array(cache.zeros)[:, :, : cache.encoded[0]].mean() / of_block
            zeros = f"{share:.3f}"
        name = f"{kind}, key_bits={setting.key_bits}, value_bits={setting.value_bits}"
        _print_bytes(name, zeros, cache.key_nbytes / dense, cache.value_nbytes / dense)
    stock = [("mlx-lm, dense", KVCache())]
    stock += [(f"mlx-lm, {bits} bits", QuantizedKVCache(bits=bits)) for bits in (8, 4)]
    for name, cache in stock:
        fill(cache, keys)
        half = cache.nbytes / dense / 2
        _print_bytes(name, "-", half, half)


def _print_bytes(name: str, zeros: str, keys: float, values: float) -> None:
    print(f"{name:37s}  {zeros:>5s}  {keys:5.3f}  {values:6.3f}  {(keys + values) / 2:8.3f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--share", type=float, default=0.655, help="of zero deltas")
    bytes_table(parser.parse_args())


if __name__ == "__main__":
    main()
