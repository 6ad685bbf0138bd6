"""How many bits stored keys and values get: by how far keys lie apart, and what errors cost.

See :mod:`mlx_delta.widths`. Keys' weights are those of the held keys; values have weights of their
own, from the same backward pass. For a wanted number of bytes, or a wanted divergence, the bits of
both are chosen by measurement, and so is whether keys are held (:mod:`.lanes`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.config import DeltaConfig
from mlx_delta.config_checks import MEAN_BITS
from mlx_delta.measure.text import context_length
from mlx_delta.models.queries import block_spread
from mlx_delta.sensitivities import Sensitivities

from .divergence import DenseText
from .lanes import MOST_TRIED, LaneSearch
from .tried import Sizes, Tried
from .weights import Watched, measure_weights, watch
from .windows import ProgressBar, check_length, cut_windows

LENGTH = 1024  # tokens of a window
# Of what errors of values cost, for their widths. Of .75 and 1 the one with the lesser divergence:
# .00053 and .00065 for values of SmolLM2-135M in 3 bits.
VALUE_POWER = 0.75
SPLIT_STEP = 0.5  # bits of a key's number more than of a value's, by which they are tried
MOST_SPLITS = 6
BISECTIONS = 6


@dataclass(frozen=True)
class CodesCalibration:
    """What a calibration found.

    Attributes:
        config: The setting.
        tried: Bits that were measured, where there was a wish; the chosen ones last.
        length: Tokens of a window.
    """

    config: DeltaConfig
    tried: tuple[Tried, ...]
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sensitivities as plain JSON values."""
        spread = self.config.loaded_sensitivities.spread
        return {
            "length": self.length,
            "spread": [None if x is None else x.tolist() for x in spread],
            "tried": [dataclasses.asdict(x) for x in self.tried],
        }


def with_codes(
    sensitivities: Sensitivities,
    watched: Watched,
    of_values: Sequence[np.ndarray] | None,
    config: DeltaConfig,
) -> Sensitivities:
    """Sensitivities that say how many bits codes get.

    Args:
        sensitivities: With weights and salience.
        watched: A window.
        of_values: What errors of values cost, see ``Felt``, [Hkv] of each held layer; ``None``: not
            known.
        config: Its block size.
    """
    spread: list[np.ndarray | None] = [None] * len(sensitivities.layers)
    costs = list(spread)
    for i, layer in enumerate(watched.layers):
        spread[layer] = block_spread(watched.keys[i], config.block_size)
        if of_values is not None:
            costs[layer] = of_values[i] ** VALUE_POWER
    return sensitivities.with_spread(spread, costs)


def calibrate_codes(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    share: float | None = None,
    kl: float | None = None,
    length: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CodesCalibration:
    """The model's setting, with what decides the bits of codes measured anew; the rest stays.

    Args:
        model: From :func:`mlx_delta.load`, calibrated.
        tokenizer: Its tokenizer.
        text: What to measure on: one window of it, and with a wish another one.
        share: Wanted: what far keys and values take at most, of what they take in 16 bits. Codes
            with so many bits are then what the setting stores, or held keys where these lose less.
        kl: Instead of it: the highest KL divergence from dense attention, in nats per token.
        length: Tokens of a window; 1,024 or the model's context if not given.
        seed: Of the labels drawn for gradients.
        progress: Show progress on stderr.

    Raises:
        ValueError: The model was not calibrated, a text that is too short, or a wish that no
            codes fulfil.
    """
    base: DeltaConfig = model.args.delta
    found = base.sensitivities
    if not isinstance(found, Sensitivities) or not found.curve:
        raise ValueError(
            "[calibrate] --codes needs sensitivities that were measured; run "
            "`python -m mlx_delta.calibrate --sparsity 0.7` on the model first."
        )
    if share is not None and kl is not None:
        raise ValueError("[calibrate] give either wanted bytes or a wanted KL divergence.")
    if kl is not None and not (math.isfinite(kl) and kl > 0):
        raise ValueError(f"[calibrate] KL, in nats per token, must be > 0 but got {kl}.")
    context = context_length(model)
    length = check_length(length or min(LENGTH, context or LENGTH), context, base)
    wished = share is not None or kl is not None
    windows = cut_windows(tokenizer, text, length, 2 if wished else 1)
    if wished and len(windows) < 2:
        raise ValueError(
            f"[calibrate] two windows of {length} tokens are needed but the text has one; give a "
            "longer --text or a smaller --length."
        )
    sizes = Sizes.of(model, windows[0][:1], base)
    if share is not None:
        sizes.check(share)
    steps = 1 + (MOST_SPLITS + MOST_TRIED + (BISECTIONS if kl is not None else 0) if wished else 0)
    with ProgressBar(steps, "calibrating", progress, "step") as bar:
        watched = watch(model, windows[0], base)
        felt = measure_weights(model, windows[0], base, watched, "gradients", seed)
        config = base.changed(sensitivities=with_codes(found, watched, felt.values, base))
        bar()
        if not wished:
            return CodesCalibration(config, (), length)
        text_read = DenseText(model, windows[1], length // 2)
        search = Search(text_read, config, sizes, bar)
        best = search.with_share(share) if share is not None else search.with_divergence(kl or 0)
        setting, tried = search.setting(best), search.tried
        if base.cuts_runs:
            lanes = LaneSearch(text_read, config, sizes, bar)
            if share is not None:
                held = lanes.with_share(share)
                less = held is not None and held.loss < best.loss
            else:
                held = lanes.with_divergence(kl or 0, best.share)
                less = held is not None and held.share < best.share
            tried += lanes.tried
            if held is not None and less:
                best, setting = held, lanes.setting(held)
    return CodesCalibration(setting, (*tried, best), length)


class Search:
    """Bits of keys and values by measurement."""

    def __init__(
        self, text: DenseText, config: DeltaConfig, sizes: Sizes, progress: Callable[[], None]
    ):
        self._text, self._config, self._sizes = text, config, sizes
        self._progress = progress
        self._known: dict[tuple[float, float], Tried] = {}

    @property
    def tried(self) -> list[Tried]:
        """What was measured."""
        return list(self._known.values())

    def setting(self, tried: Tried) -> DeltaConfig:
        """The setting that stores these codes."""
        return self._with(tried.key_bits, tried.value_bits)

    def _with(self, key_bits: float, value_bits: float) -> DeltaConfig:
        fields = {"key_format": "codes", "key_bits": key_bits, "value_bits": value_bits}
        return self._config.changed(**fields, key_widths=None, value_widths=None)

    def _measure(self, share: float, split: float) -> Tried:
        # Rounded down, so that no more bytes are taken than wanted.
        bits = self._sizes.bits(share, split)
        pair = tuple(max(MEAN_BITS[0], math.floor(1000 * x + 1e-6) / 1000) for x in bits)
        key_bits, value_bits = pair
        if (key_bits, value_bits) not in self._known:
            found = self._text.compare(self._with(key_bits, value_bits))
            taken = self._sizes.share(key_bits, value_bits)
            self._known[key_bits, value_bits] = Tried(key_bits, value_bits, taken, found)
            self._progress()
        return self._known[key_bits, value_bits]

    def _best_split(self, share: float) -> tuple[float, Tried]:
        """How many bits more keys get than values, so that a share of bytes loses least."""
        split, best = 0.0, self._measure(share, 0.0)
        for step in (SPLIT_STEP, -SPLIT_STEP):
            start = split
            while len(self._known) < MOST_SPLITS:
                other = self._measure(share, split + step)
                if other.loss >= best.loss:
                    break
                split, best = split + step, other
            if split != start:
                break
        return split, best

    def with_share(self, share: float) -> Tried:
        """The least divergence for a share of bytes."""
        return self._best_split(share)[1]

    def with_divergence(self, wanted: float) -> Tried:
        """The least bytes with at most this divergence.

        Raises:
            ValueError: The most bits that codes may have diverge more.
        """
        low, high = (self._sizes.share(bits, bits) for bits in MEAN_BITS)
        best = self._measure(high, 0.0)
        if best.loss > wanted:
            raise ValueError(
                f"[calibrate] KL must be at least {best.loss:.3g}, which codes of "
                f"{MEAN_BITS[1]} bits have on this text, but got {wanted}."
            )
        split = 0.0
        for i in range(BISECTIONS):
            # By the logarithm, as every bit more takes a part of what errors cost.
            share = (low + high) / 2
            if i == 1:
                split, found = self._best_split(share)
            else:
                found = self._measure(share, split)
            if found.loss <= wanted:
                high, best = share, min(best, found, key=lambda x: x.share)
            else:
                low = share
        return best


def report(found: CodesCalibration) -> list[str]:
    """What to print: what was tried, and the widths of each layer's codes."""
    config, lines = found.config, []
    if found.tried:
        lines.append(f"The second half of {found.length} tokens:")
        lines.append("keys   zeros  key_bits  value_bits  bytes       KL   top-1")
        lines += map(_row, found.tried[:-1])
        lines += ["Chosen:", _row(found.tried[-1])]
    else:
        fields = {"key_format": "codes", "key_bits": 3, "value_bits": 3}
        config = config.changed(**fields, key_widths=None, value_widths=None)
    chosen = config.with_widths()
    assert chosen.key_widths is not None and chosen.value_widths is not None
    bits = f"{config.key_bits} and {config.value_bits} bits"
    lines.append(f"Layers, mean widths of each head's keys, and widths of its values, at {bits}:")
    for i, (keys, values) in enumerate(zip(chosen.key_widths, chosen.value_widths, strict=True)):
        if keys is not None and values is not None:
            means = [np.mean([int(digit) for digit in head]) for head in keys]
            cells = " ".join(f"{mean:.2f}" for mean in means)
            lines.append(f"{i:5d}  {cells}  {' '.join(map(str, values))}")
    return lines


def _row(tried: Tried) -> str:
    held = tried.level is not None
    kind = f"held   {tried.found.zeros:5.3f}" if held else "codes      –"
    found = f"{tried.loss:7.5f}  {tried.found.top1:6.3f}"
    return f"{kind}  {tried.key_bits:8.3f}  {tried.value_bits:10.3f}  {tried.share:5.3f}  {found}"
