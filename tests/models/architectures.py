"""Which of mlx-lm's architectures attend with the delta: tried on a tiny model of each.

    python -m tests.models.architectures > docs/architectures.md

writes the table of the documentation. The tests check the same findings.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_delta import DeltaConfig
from mlx_delta.cache import DeltaKVCache
from mlx_delta.cache.check_state import leaves
from mlx_delta.measure.operations import count_operations
from mlx_delta.models.anatomy import dense_caches
from mlx_delta.models.any import apply, remove

from .tiny_models import tiny_models

TOKENS = 26
LEAST_VOCABULARY = 32  # of all the models that mlx-lm's tests build
CUTS = (0, 11, 12, 21, 22, 23, 26)  # chunks of several tokens and of one, across blocks
SMALL = {"block_size": 4, "window": 4, "sinks": 1}

ON = DeltaConfig(**SMALL, threshold=1.5)
NOTHING_HELD = DeltaConfig(**SMALL, threshold=0.0)
FEW_HELD = DeltaConfig(**SMALL, threshold=0.01)
COVERS_ALL = DeltaConfig(window=4096)


@dataclass
class Finding:
    """What came of applying the delta to one architecture.

    Attributes:
        name: mlx-lm's name of the file.
        refused: Why the delta was refused; empty if it was applied.
        held: Caches that are ours.
        left: Kinds of the other caches, and how many.
        operations: Of one token, dense and with the delta on; both with the same tokens before.
        wrong: Checks that failed, with figures.
    """

    name: str
    refused: str = ""
    held: int = 0
    left: Counter[str] = field(default_factory=Counter)
    operations: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list)


def examine(name: str, model: nn.Module) -> Finding:
    """Try the delta on one model."""
    finding = Finding(name)
    tokens = mx.array(np.random.default_rng(1).integers(1, LEAST_VOCABULARY, (1, TOKENS)))
    dense = run(model, dense_caches(model), tokens)
    try:
        apply(model, ON)
    except ValueError as error:
        finding.refused = str(error)
        if not mx.array_equal(run(model, dense_caches(model), tokens), dense):
            finding.wrong.append("refused, but its logits changed")
        return finding
    caches = leaves(model.make_cache())
    finding.held = sum(isinstance(cache, DeltaKVCache) for cache in caches)
    finding.left = Counter(type(c).__name__ for c in caches if not isinstance(c, DeltaKVCache))
    finding.wrong = list(check(model, dense, tokens))
    finding.operations = operations(model, tokens)
    remove(model)
    if not mx.array_equal(run(model, dense_caches(model), tokens), dense):
        finding.wrong.append("after remove its logits are not what they were")
    return finding


def check(model: nn.Module, dense: mx.array, tokens: mx.array) -> Iterator[str]:
    """What is wrong with a model that has the delta ``ON``."""
    if not mx.array_equal(run(model, dense_caches(model), tokens), dense):
        yield "with mlx-lm's caches its logits are not mlx-lm's"
    whole = run(model, model.make_cache(), tokens)
    if not mx.isfinite(whole).all():
        yield "its logits are not finite"
    if not mx.array_equal(model(tokens)[0], whole):
        yield "without caches its logits are others"
    if apart(whole, dense) < 1e-4:
        yield "the delta does not act"
    parts = run(model, model.make_cache(), tokens, CUTS)
    if (error := apart(parts, whole)) > 1e-3:
        # Some of mlx-lm's own models depend on the cut.
        stock = apart(run(model, dense_caches(model), tokens, CUTS), dense)
        if error > 4 * stock:
            yield f"in chunks its logits differ by {error:.2g} (dense: {stock:.2g})"
    for config, name, most in (
        (COVERS_ALL, "with a window over all", 0.0),
        (NOTHING_HELD, "with nothing held", 1e-3),
        (FEW_HELD, "with a small threshold", 0.1),
    ):
        apply(model, config)
        error = apart(run(model, model.make_cache(), tokens), dense)
        if error > most:
            yield f"{name} its logits differ by {error:.2g}"
    apply(model, ON)


def run(
    model: nn.Module, caches: list[Any], tokens: mx.array, cuts: Sequence[int] = (0, TOKENS)
) -> mx.array:
    """Logits [L, vocabulary] of tokens [1, L], in parts."""
    parts = []
    for start, end in itertools.pairwise(cuts):
        parts.append(model(tokens[:, start:end], cache=caches)[0])
        mx.eval(parts[-1], [cache.state for cache in caches])
    return mx.concatenate(parts)


def apart(logits: mx.array, others: mx.array) -> float:
    """The root mean square of a difference, in standard deviations of the second logits.

    Logits that are infinite in both (tokens that mean nothing) are left out.
    """
    a, b = (np.array(x.astype(mx.float32)) for x in (logits, others))
    counted = np.isfinite(b)
    spread = float(b[counted].std()) or 1.0
    return float(np.sqrt(np.mean((a[counted] - b[counted]) ** 2))) / spread


def operations(model: nn.Module, tokens: mx.array) -> tuple[int, int]:
    """Operations in the graph of one token that encodes no block: dense, and with the delta on."""
    counts = []
    for caches in (dense_caches(model), model.make_cache()):
        run(model, caches, tokens)
        counts.append(count_operations(model(tokens[:, :1], cache=caches)))
    return counts[0], counts[1]


def find_all(wanted: Callable[[int, str], bool] = lambda i, name: True) -> list[Finding]:
    """The findings of every architecture.

    Args:
        wanted: Whether to look at the one of this number and name.

    Raises:
        CannotFetch: mlx-lm's tests can't be fetched.
    """
    findings = []
    for i, (name, model) in enumerate(tiny_models()):
        if not wanted(i, name):
            continue
        findings.append(examine(name, model))
        report(findings[-1])
    return findings


def report(finding: Finding) -> None:
    """What the table does not show, for who writes it anew."""
    dense, on = finding.operations
    print(f"{finding.name}: {dense} operations, {on} with the delta", file=sys.stderr)
    for wrong in finding.wrong:
        print(f"{finding.name}: {wrong}", file=sys.stderr)


INTRODUCTION = """\
# Architectures

`mlx_delta.load` and `mlx_delta.apply(model, DeltaConfig(...))` give hybrid delta attention, and our
stores of keys and values, to every model of mlx-lm's that keeps ordinary keys and values. This
table is generated from a run over the architectures of mlx-lm {version} that its own tests build,
and a few more, each as a tiny random model
(`python -m tests.models.architectures > docs/architectures.md`).

Of {total} architectures {works} take the delta and {refused} are refused.

Checked of each that takes it: with mlx-lm's own caches its logits are mlx-lm's to the bit, and so
they are with a window that covers the text (26 tokens; a long text agrees to rounding); with the
delta on they are finite, the same whether a text comes at once or in pieces, and near the dense
ones at a small threshold; a token that encodes no block takes no more operations than in mlx-lm,
where keys are stored in full; afterwards `mlx_delta.remove` gives back mlx-lm's model.

*Held*: caches with held keys, of all that the model makes; one layer each. The others are left to
mlx-lm, with their own attention: windows (`RotatingKVCache`), chunks (`ChunkedKVCache`), recurrent
states and convolutions (`ArraysCache`). `llama` (also Mistral) and `bitnet` have classes of our
own as well, which `load` takes.

| architecture | held | left to mlx-lm | result |
|---|---|---|---|
"""


def document(findings: list[Finding]) -> str:
    """The documentation's page."""
    refused = sum(bool(finding.refused) for finding in findings)
    text = INTRODUCTION.format(
        version=importlib.metadata.version("mlx-lm"),
        total=len(findings),
        works=len(findings) - refused,
        refused=refused,
    )
    return text + "".join(row(finding) for finding in findings)


def row(finding: Finding) -> str:
    if finding.refused:
        _, _, reason = finding.refused.removesuffix(".").partition("] ")
        reason = (
            reason.partition(" ")[2]
            .removeprefix("has ")
            .partition(", which can't")[0]
            .partition(" (")[0]
        )
        return f"| {finding.name} | – | – | refused: {reason} |\n"
    left = ", ".join(f"{n} `{kind}`" for kind, n in sorted(finding.left.items()))
    total = finding.held + sum(finding.left.values())
    return f"| {finding.name} | {finding.held} of {total} | {left or '–'} | works |\n"


if __name__ == "__main__":
    print(document(find_all()), end="")
