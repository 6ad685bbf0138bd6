"""Speed against stock mlx-lm: its own model and ours with the delta off and on, alternating.

    python examples/stock_speed.py

The weights and the BLAS are the same. `python -m mlx_delta.benchmark` compares ways to keep keys
and values on our model; this shows that our model without the delta is as fast as the stock one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
from mlx_lm.utils import load_model

from mlx_delta import load
from mlx_delta.loading import find_model
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.system.devices import has_gpu


def speed_table(args: argparse.Namespace) -> None:
    """Print prefill and decode times of the three, alternating."""
    model, tokenizer = load(args.model)
    length, steps = args.tokens, args.steps
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
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="a Llama; default: %(default)s")
    parser.add_argument("--text", default=BUNDLED_TEXT, help="default: the bundled book")
    parser.add_argument("--tokens", type=int, default=1984, help="of the prompt")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    speed_table(parser.parse_args())


if __name__ == "__main__":
    main()
