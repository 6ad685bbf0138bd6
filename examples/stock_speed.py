"""Speed against stock mlx-lm: its own model and ours with the delta off and on, alternating.

    python examples/stock_speed.py
    python examples/stock_speed.py --model smollm2 --tokens 8192 --steps 0 --tiles 0.95

The weights and the BLAS are the same, and the prompt goes in chunks as mlx-lm cuts it. Processor
seconds are printed beside the clock's: on a busy machine they are what can be compared (with
OPENBLAS_NUM_THREADS=1, since waiting threads count too). `python -m mlx_delta.benchmark` compares
ways to keep keys and values on our model; this compares our model with the stock one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
from mlx_lm.utils import dequantize_model, load_model

from mlx_delta import DeltaConfig, load
from mlx_delta.loading import find_model
from mlx_delta.measure.sparsity import measure_density
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.system.devices import has_gpu

CHUNK = 2048  # of a prompt, as in mlx-lm


def speed_table(args: argparse.Namespace) -> None:
    """Print prefill and decode times of the three, alternating."""
    model, tokenizer = load(args.model)
    length, steps = args.tokens, args.steps
    stock, _ = load_model(find_model(args.model))
    off, _ = load(args.model, None)
    if not has_gpu():  # float32 weights, as ours are there
        stock = dequantize_model(stock)
        stock.set_dtype(mx.float32)
    models = {"stock mlx-lm": stock, "delta off": off}
    if not args.no_delta:
        models["delta on"] = model
    if args.tiles is not None:
        # Full keys: what tiles alone gain.
        setting = DeltaConfig(threshold=0.0, prefill="tiles", tiles=args.tiles)
        models[f"tiles {args.tiles}"], _ = load(args.model, setting)
    if args.layers is not None:
        for one in models.values():
            one.model.layers = one.model.layers[: args.layers]
    ids = tokenizer.encode(read_text(args.text), add_special_tokens=False)[: length + steps]
    prefill: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    decode: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    caches: dict[str, list[Any]] = {}
    if args.warm_up:
        for one in models.values():
            _timed(one, ids[:length], one.make_cache())
    for _ in range(args.repeats):
        for name, seconds in prefill.items():
            caches[name] = models[name].make_cache()
            seconds.append(_timed(models[name], ids[:length], caches[name]))
        for token in ids[length:]:
            for name, seconds in decode.items():
                seconds.append(_timed(models[name], [token], caches[name]))
    print(
        f"{length} tokens of prompt, {steps} decoded one by one, taking turns; median (least) "
        f"over {args.repeats} rounds, and how many times faster than stock mlx-lm's median (least)"
    )
    for what, times in (("prefill", prefill), ("decode", decode)):
        if any(times.values()):
            print(f"{what:16s}seconds                     processor seconds")
            for name in models:
                print(f"{name:14s}  {_cells(times[name], times['stock mlx-lm'])}")
    for name in models:
        if (density := measure_density(caches[name])) is not None:
            print(f"{name}: {density:.3f} of the tiles computed")


def _cells(times: list[tuple[float, float]], base: list[tuple[float, float]]) -> str:
    """Both kinds of seconds, each with the ratio to the base's."""
    cells = []
    for kind in (0, 1):
        mine, theirs = ([pair[kind] for pair in pairs] for pairs in (times, base))
        median, least = statistics.median(mine), min(mine)
        ratio, best = statistics.median(theirs) / median, min(theirs) / least
        cells.append(f"{median:8.4f} ({least:8.4f}) {ratio:5.2f} ({best:4.2f})")
    return "   ".join(cells)


def _timed(model: Any, ids: list[int], caches: list[Any]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor, that a model takes for these tokens."""
    clock, processor = time.perf_counter(), time.process_time()
    for first in range(0, len(ids) - 1, CHUNK):  # the caches alone, no logits
        model(mx.array(ids[:-1][first : first + CHUNK])[None], cache=caches)
        mx.eval([x for cache in caches for x in cache.state if isinstance(x, mx.array)])
    mx.eval(model(mx.array(ids[-1:])[None], cache=caches))
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="a Llama; default: %(default)s")
    parser.add_argument("--text", default=BUNDLED_TEXT, help="default: the bundled book")
    parser.add_argument("--tokens", type=int, default=1984, help="of the prompt")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--tiles", type=float, help="also with prefill by tiles of so much")
    parser.add_argument("--layers", type=int, help="of the model: only the first so many")
    parser.add_argument("--no-delta", action="store_true", help="leave out the delta")
    parser.add_argument(
        "--no-warm-up", dest="warm_up", action="store_false", help="for runs that take minutes"
    )
    speed_table(parser.parse_args())


if __name__ == "__main__":
    main()
