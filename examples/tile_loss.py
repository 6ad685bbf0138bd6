"""What prefill by tiles costs: KL divergence from exact prefill, at a prompt's end and after it.

    python examples/tile_loss.py --model smollm2 --tokens 1024 2048 4096 --tiles 0.8 0.85 0.9

The prompt is prefilled exactly and by tiles, in chunks as mlx-lm cuts it; then both go on, exactly,
with the text that follows. Prints the density (the part of the tiles that was computed), the KL
divergence of the next token in the prompt's last 256 positions with no end known, the same with
the end known (of the prompt's last token), and after the prompt; and how often the most likely
token is another one.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
import numpy as np

from mlx_delta import DeltaConfig, load
from mlx_delta.measure.sparsity import measure_density
from mlx_delta.measure.text import BUNDLED_TEXT, read_text
from mlx_delta.models.common import make_delta_caches

CHUNK, END, AFTER = 2048, 256, 128


def log_probabilities(model: Any, ids: list[int], caches: list[Any]) -> tuple[Any, Any]:
    """Of the prompt's last positions, and of those after it, which come a few at a time."""
    length = len(ids) - AFTER
    for first in range(0, length - END, CHUNK):
        last = min(first + CHUNK, length)
        hidden = model.model(mx.array(ids[first:last])[None], cache=caches)
        mx.eval(hidden)
    end = _logs(model, hidden[:, -END:])
    after = []
    for first in range(length, len(ids), 16):
        hidden = model.model(mx.array(ids[first : first + 16])[None], cache=caches)
        after.append(_logs(model, hidden))
    return end, np.concatenate(after)


def _logs(model: Any, hidden: mx.array) -> np.ndarray:
    logits = (
        model.model.embed_tokens.as_linear(hidden)
        if model.args.tie_word_embeddings
        else model.lm_head(hidden)
    ).astype(mx.float32)
    return np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0])


def divergence(exact: np.ndarray, other: np.ndarray) -> str:
    """KL divergence in nats, and the share of positions with another most likely token."""
    kl = (np.exp(exact) * (exact - other)).sum(axis=-1).mean()
    return f"{kl:8.5f} ({(exact.argmax(-1) != other.argmax(-1)).mean():.3f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="a Llama; default: %(default)s")
    parser.add_argument("--text", default=BUNDLED_TEXT, help="default: the bundled book")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of the prompt")
    parser.add_argument("--tiles", type=float, nargs="+", default=[0.85], help="shares to compute")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text to leave out")
    args = parser.parse_args()
    model, tokenizer = load(args.model, None)
    text = tokenizer.encode(read_text(args.text), add_special_tokens=False)[args.skip :]
    print("tokens  tiles  density  KL at the end (flips)  its last token     after it (flips)")
    for length in args.tokens:
        ids = text[: length + AFTER]
        exact = log_probabilities(model, ids, model.make_cache())
        for share in args.tiles:
            # Full keys: the loss is that of tiles alone.
            setting = DeltaConfig(threshold=0.0, prefill="tiles", tiles=share)
            found, density = [], None
            for known in (None, length):
                caches = make_delta_caches(model.layers, setting, known)
                found.append(log_probabilities(model, ids, caches))
                density = density or measure_density(caches)
            cells = [
                divergence(exact[0], found[0][0]),
                divergence(exact[0][-1:], found[1][0][-1:]),
                divergence(exact[1], found[1][1]),
            ]
            print(
                f"{length:6d}  {share:5.2f}  {density or 1:7.3f}  {'       '.join(cells)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
