"""What a model is judged by: bits per byte of unseen text, and recall of facts far back."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from recall import RecallTask
from tokenizers import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Length in bytes of every token: in byte-level BPE one character stands for one byte."""
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for token, i in tokenizer.get_vocab().items():
        lengths[i] = 0 if token.startswith("<|") else len(token)
    return lengths


@torch.no_grad()
def losses(model, ids: np.ndarray, autocast: bool = True) -> np.ndarray:
    """Cross-entropy in nats of every target: ids [B, T + 1] -> [B, T]."""
    device = model.embed_tokens.weight.device
    out = []
    rows = max(1, 8192 // ids.shape[1])
    for i in range(0, len(ids), rows):
        x = torch.from_numpy(ids[i : i + rows].astype(np.int64)).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model(x[:, :-1]).float()
        out.append(F.cross_entropy(logits.mT, x[:, 1:], reduction="none").cpu().numpy())
    return np.concatenate(out)


def bits_per_byte(
    model, tokenizer, ids, window: int = 2048, windows: int | None = None, autocast: bool = True
) -> float:
    """Bits per byte of `ids` [n], cut into windows that share no context.

    Each window's first token is not predicted and its bytes are not counted.
    """
    count = (len(ids) - 1) // window
    starts = np.arange(count)
    if windows and windows < count:
        starts = starts[:: count // windows][:windows]
    rows = np.stack([ids[i * window : (i + 1) * window + 1] for i in starts])
    nats = losses(model, rows, autocast).sum()
    return float(nats / math.log(2) / token_bytes(tokenizer)[rows[:, 1:]].sum())


@torch.no_grad()
def recall(
    model,
    task: RecallTask,
    prose: np.ndarray,
    length: int,
    facts: int,
    answers: int,
    template: str = "direct",
    seed: int = 1234,
    autocast: bool = True,
) -> float:
    """Share of the answer tokens that the model ranks first, facts told early and asked late."""
    device = model.embed_tokens.weight.device
    rng = np.random.default_rng(seed)
    hits: list[np.ndarray] = []
    while sum(map(len, hits)) < answers:
        sample = task.sample(
            rng, length, facts, prose=prose, templates=[template], told_until=0.5, asked_from=0.75
        )
        x = torch.from_numpy(sample.ids).to(device)[None]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            best = model(x[:, :-1])[0].argmax(-1).cpu().numpy()
        hits.append(best[sample.answers - 1] == sample.ids[sample.answers])
    return float(np.concatenate(hits).mean())
