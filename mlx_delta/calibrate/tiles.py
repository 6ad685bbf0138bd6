"""Which share of a prompt's attention each layer computes, for a wanted loss.

Tiles are dropped in one layer at a time, the others attend exactly; of a few shares each layer
gets the least at which the KL divergence stays under its part of the whole. All together are then
measured once more, and while they lose more than was wanted the parts are halved.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.config import DeltaConfig
from mlx_delta.measure.text import context_length
from mlx_delta.method.tiles import EXACT_BEGIN, EXACT_END

from .divergence import Comparison, DenseText
from .windows import ProgressBar, cut_windows

DEFAULT_KL = 0.005
LENGTH = 4096  # tokens of the prompt
SCORED = 128  # positions at its end, and as many after it
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)  # and 1: all tiles
HALVINGS = 8


@dataclass(frozen=True)
class TileCalibration:
    """What a calibration found.

    Attributes:
        config: The setting, with a share for each layer.
        chosen: What it does to the text.
        kl: What was wanted.
        part: A layer's part of it in the end.
        length: Tokens of the prompt.
        curves: By layer, of those with the delta: the shares it was measured at, and the
            divergence there.
    """

    config: DeltaConfig
    chosen: Comparison
    kl: float
    part: float
    length: int
    curves: dict[int, dict[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        curves = {str(layer): dict(sorted(own.items())) for layer, own in self.curves.items()}
        return {
            "delta": self.config.to_dict(),
            "chosen": asdict(self.chosen),
            "kl": self.kl,
            "part": self.part,
            "length": self.length,
            "curves": curves,
        }


@dataclass
class _Layer:
    """One layer's divergence over shares, measured where it is asked for."""

    measure: Callable[[float], float]
    known: dict[float, float] = field(default_factory=dict)

    def least_share(self, most: float) -> float:
        """The least share at which the divergence is ``most`` or less; taken to fall with it."""

        def enough(index: int) -> bool:
            share = SHARES[index]
            if share not in self.known:
                self.known[share] = self.measure(share)
            return self.known[share] <= most

        index = bisect.bisect_left(range(len(SHARES)), True, key=enough)
        return SHARES[index] if index < len(SHARES) else 1.0


def calibrate_tiles(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    text: str | Sequence[int],
    *,
    kl: float = DEFAULT_KL,
    length: int | None = None,
    progress: bool = False,
) -> TileCalibration:
    """Choose the share of tiles of each layer.

    Args:
        model: From :func:`mlx_delta.load`, with the delta; the setting it has is kept otherwise.
        tokenizer: Its tokenizer.
        text: What to calibrate on: one window of it is, at its start.
        kl: The highest KL divergence from exact prefill, in nats per token, over a prompt's last
            positions and those after it.
        length: Tokens of the prompt; 4,096, or as the model's context allows.
        progress: Show progress on stderr.

    Raises:
        ValueError: A wish that can't be fulfilled, or a text that is too short.
    """
    base = model.args.delta
    if not (math.isfinite(kl) and kl > 0):
        raise ValueError(f"[calibrate] KL for tiles, in nats per token, must be > 0 but got {kl}.")
    length = _check_length(length, context_length(model), base)
    # Full keys: what tiles alone lose.
    tiles = DeltaConfig(
        threshold=0.0, block_size=base.block_size, window=base.window, prefill="tiles"
    )
    (window,) = cut_windows(tokenizer, text, length + SCORED, 1)
    dense = DenseText(model, window, length - SCORED, prompt=length)
    layers = dense.held_layers(tiles)
    steps = len(layers) * math.ceil(math.log2(len(SHARES))) + 1
    with ProgressBar(steps, "calibrating tiles", progress, "pass") as step:

        def measured(layer: int) -> Callable[[float], float]:
            def measure(share: float) -> float:
                found = dense.compare(tiles.changed(tiles=share), only=layer)
                step()
                return found.divergence

            return measure

        curves = {layer: _Layer(measured(layer)) for layer in layers}
        part = kl / len(layers)
        for _ in range(HALVINGS):
            shares = [
                curves[i].least_share(part) if i in curves else 1.0 for i in range(dense.n_layers)
            ]
            chosen = dense.compare(tiles.changed(tiles=tuple(shares)))
            step()
            if chosen.divergence <= kl:
                break
            part /= 2
        else:
            raise ValueError(
                f"[calibrate] with a {2**HALVINGS}th of {kl} for each layer the divergence is "
                f"still {chosen.divergence:.5f}; ask for a higher one."
            )
    config = base.changed(tiles=tuple(shares))
    known = {layer: curve.known for layer, curve in curves.items()}
    return TileCalibration(config, chosen, kl, part, length, known)


def _check_length(length: int | None, context: int | None, base: DeltaConfig) -> int:
    """Tokens of the prompt.

    Raises:
        ValueError: The context is shorter, or so few tokens have no tiles to choose from.
    """
    room = None if context is None else context - SCORED
    if length is None:
        length = LENGTH if room is None else min(LENGTH, room)
    if room is not None and length > room:
        raise ValueError(
            f"[calibrate] a prompt of {length} tokens and {SCORED} after it are more than the "
            f"model's context of {context}; give a smaller --length."
        )
    first = max(EXACT_BEGIN, (base.window_blocks + 2) * base.block_size)
    least = first + base.block_size + EXACT_END
    if length < least:
        raise ValueError(
            f"[calibrate] no tiles can be chosen in {length} tokens; --length must be >= {least}."
        )
    return length
