"""Peak memory of reading a prompt, above the weights, for several ways to keep keys and values.

    python examples/peak_memory.py --tokens 2048 8192 --settings dense kv4 delta:kv=balanced

Each figure is of a process of its own, which reads a prompt in chunks, as mlx-lm does. Beside the
peak stands what the caches take in the end. The prompt is the bundled text, again and again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import mlx_delta  # isort: skip  (before MLX, for the faster BLAS)
import mlx.core as mx
import numpy as np

from mlx_delta import DeltaConfig
from mlx_delta.measure.settings import parse_setting
from mlx_delta.measure.text import BUNDLED_TEXT, encode_text, read_text
from mlx_delta.models.llama import Model, ModelArgs

RANDOM = "random"  # a small model with random weights, for very long texts
SETTINGS = ["dense", "kv8", "kv4", "delta", "delta:kv=balanced"]


def random_model() -> Model:
    """A small Llama with random weights."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    more = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 4096}
    model = Model(ModelArgs.from_dict({**sizes, **more, "delta": DeltaConfig()}))
    mx.eval(model.parameters())
    return model


def measure(model_name: str, name: str, tokens: int, step: int) -> dict[str, float]:
    """One figure, in this process."""
    if model_name == RANDOM:
        model, ids = random_model(), np.random.default_rng(0).integers(0, 4096, tokens).tolist()
    else:
        model, tokenizer = mlx_delta.load(model_name)
        ids = encode_text(tokenizer, read_text(BUNDLED_TEXT))
        ids = (ids * (tokens // len(ids) + 1))[:tokens]
    setting = parse_setting(name, model.args.delta)
    caches = setting.make_caches(model, tokens)
    mx.clear_cache()
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    for first in range(0, tokens, step):  # as mlx-lm does, but for the last token
        model(mx.array(ids[first : min(tokens, first + step)])[None], cache=caches)
        setting.settle(caches)
        mx.clear_cache()
    return {
        "peak": (mx.get_peak_memory() - weights) / 1e6,
        "caches": sum(cache.nbytes for cache in caches) / 1e6,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help=f"{RANDOM!r}: a small one, random weights")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        setting, tokens, step = args.settings[0], args.tokens[0], args.prefill_step_size
        print(json.dumps(measure(args.model, setting, tokens, step)))
        return
    print("| tokens | setting | peak above weights, MB | caches, MB | seconds |")
    print("|---|---|---|---|---|")
    for tokens in args.tokens:
        for setting in args.settings:
            flags = ["--model", args.model, "--tokens", str(tokens), "--settings", setting, "--one"]
            flags += ["--prefill-step-size", str(args.prefill_step_size)]
            run = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            x = json.loads(run.stdout.splitlines()[-1])
            row = f"{tokens} | `{setting}` | {x['peak']:.0f} | {x['caches']:.1f}"
            print(f"| {row} | {x['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
