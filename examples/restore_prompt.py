"""A prompt read, and had again from disk: seconds, bytes, and whether the answer is the same.

    python examples/restore_prompt.py --model demo --tokens 2000

For each setting: the seconds of reading the prompt, of finding it in a directory of prefixes after
a restart, and of loading a prompt file; the bytes on disk, of those that the caches have; and the
first tokens of the answer, which are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_delta  # isort: skip  (before MLX, for the faster BLAS)
import mlx.core as mx
import numpy as np

from mlx_delta.cache import prompt_file
from mlx_delta.measure.settings import parse_setting
from mlx_delta.measure.text import BUNDLED_TEXT, encode_text, read_text
from mlx_delta.prefixes import PrefixCache, PrefixDirectory, fingerprint

SETTINGS = ["delta:key_bits=4,value_bits=4", "delta:kv=balanced", "delta", "dense"]
ANSWER = 8


def ready(caches: list[Any]) -> list[Any]:
    """The caches, computed."""
    mx.eval([cache.state for cache in caches])
    return caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    args = parser.parse_args()
    model, tokenizer = mlx_delta.load(args.model)
    name = fingerprint(model)
    text = encode_text(tokenizer, read_text(BUNDLED_TEXT))[: args.tokens + 1]
    print("| setting | prefill, s | from the directory, s | of it | from a file, s |", end="")
    print(" bytes, of the caches' | the file's | the same answer |")
    print("|---|---|---|---|---|---|---|---|")
    for setting in (parse_setting(x, model.args.delta) for x in args.settings):

        def go_on(caches: list[Any], setting: Any = setting) -> list[np.ndarray]:
            logits, token = [], text[-1]
            for _ in range(ANSWER):
                logits.append(np.array(setting.forward(model, [token], caches)[-1]))
                token = int(logits[-1].argmax())
            return logits

        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            caches = setting.make_caches(model, args.tokens)
            setting.prefill(model, text[:-1], caches)
            read = time.perf_counter() - start
            store = PrefixCache(directory=PrefixDirectory(folder, 1 << 40))
            store.insert_cache(name, text[:-1], caches)
            file = Path(folder) / "prompt.safetensors"
            prompt_file.save(file, caches, {"model": args.model, "tokenizer_config": "{}"})
            start = time.perf_counter()
            store = PrefixCache(directory=PrefixDirectory(folder, 1 << 40))
            found, rest = store.fetch_nearest_cache(name, text)
            assert found is not None and rest == text[-1:]
            ready(found)
            restored = time.perf_counter() - start
            start = time.perf_counter()
            loaded = ready(prompt_file.load(file)[0])
            opened = time.perf_counter() - start
            nbytes = sum(cache.nbytes for cache in caches)
            kept = sum(path.stat().st_size for path in Path(folder, "v1").rglob("*.safetensors"))
            share, of_file = kept / nbytes, file.stat().st_size / nbytes
            answers = [go_on(x) for x in (caches, found, loaded)]
            same = all(np.array_equal(answers[0], x) for x in answers[1:])
            print(
                f"| `{setting.name}` | {read:.2f} | {restored:.3f} | {restored / read:.3f} | "
                f"{opened:.3f} | {share:.3f} | {of_file:.3f} | {'yes' if same else 'NO'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
