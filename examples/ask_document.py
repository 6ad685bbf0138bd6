"""Read a long text once, then ask several questions about it: the Python API in a small app.

    python examples/ask_document.py examples/memory.txt "The password of Anna is" "Mr. Holmes said"

The text is prefilled once; each question goes on from a copy of its caches.
"""

from __future__ import annotations

import argparse
import copy
import sys

import mlx_delta
from mlx_delta.generate.checks import check_prompt
from mlx_delta.measure.text import read_text
from mlx_delta.system.cli import run_command

import mlx.core as mx  # isort: skip  (after mlx_delta: it chooses the BLAS)

STEP = 512  # tokens prefilled at a time


def main() -> int:
    """Answer the questions of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", help="a text file")
    parser.add_argument("questions", nargs="+", help="what to go on with after the text")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=12)
    args = parser.parse_args()
    return run_command(lambda: answer(args), "use a shorter text or a smaller model")


def answer(args: argparse.Namespace) -> None:
    text = read_text(args.document)
    model, tokenizer = mlx_delta.load(args.model)
    document = tokenizer.encode(text)
    check_prompt("ask_document", model, document)
    caches = model.make_cache(prompt_length=len(document))
    for start in range(0, len(document), STEP):
        model(mx.array([document[start : start + STEP]]), cache=caches)
        # Only the caches: logits of every token of a text would take gigabytes.
        mx.eval([cache.state for cache in caches])
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
    sys.exit(main())
