"""Read a long text once, then ask several questions about it: the Python API in a small app.

    python examples/ask_document.py examples/memory.txt "The password of Anna is" "Mr. Holmes said"

The text is prefilled once; each question goes on from a copy of its caches.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import mlx_delta

import mlx.core as mx  # isort: skip  (after mlx_delta: it chooses the BLAS)


def main() -> None:
    """Answer the questions of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, help="a text file")
    parser.add_argument("questions", nargs="+", help="what to go on with after the text")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=12)
    args = parser.parse_args()

    model, tokenizer = mlx_delta.load(args.model)
    document = tokenizer.encode(args.document.read_text(encoding="utf-8"))
    caches = model.make_cache(prompt_length=len(document))
    mx.eval(model(mx.array(document)[None], cache=caches))
    sparsity = mlx_delta.measure_sparsity(caches, len(document))
    megabytes = sum(cache.nbytes for cache in caches) / 1e6
    print(
        f"{len(document)} tokens read: {sparsity.prefill:.0%} of the multiply-accumulates of QK^T "
        f"skipped, {megabytes:.1f} MB of cache"
    )
    for question in args.questions:
        ids = tokenizer.encode("\n\n" + question, add_special_tokens=False)
        print(f"\n{question}", end=" ", flush=True)
        for response in mlx_delta.stream_generate(
            model,
            tokenizer,
            ids,
            prompt_cache=copy.deepcopy(caches),
            max_tokens=args.max_tokens,
        ):
            print(response.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
