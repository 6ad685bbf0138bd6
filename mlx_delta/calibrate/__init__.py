"""Choosing thresholds for a wanted sparsity or a wanted loss, on any model and text.

``record.py`` measures what thresholds skip and what attention errors they make,
``sensitivity.py`` what holding a layer does to the model's output, ``solve.py`` shares the
skipping out, ``family.py`` puts them together, ``loss.py`` measures losses, ``write.py`` changes a
config.json; the command line (``python -m mlx_delta.calibrate``) is beside them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.config import DeltaConfig, ThresholdMode
from mlx_delta.measure.text import context_length

from .family import Family, Per, beyond
from .loss import mean_loss, sparsest_within
from .record import Recording, highest_sparsity, record
from .sensitivity import Sensitivity, measure_sensitivity, passes
from .solve import Curve
from .windows import ProgressBar, check_length, cut_windows

Cost = Literal["kl", "attention"]

WINDOWS = 8
KL_WINDOWS = 2  # a pass for each layer and threshold: more are rarely worth the time
BISECTIONS = 8


@dataclass(frozen=True)
class LossRise:
    """Losses of the held-back windows, in nats per token."""

    dense: float
    delta: float

    @property
    def rise(self) -> float:
        """What the delta adds."""
        return self.delta - self.dense


@dataclass(frozen=True)
class Divergence:
    """KL divergence from dense attention, in nats per token.

    Attributes:
        measured: Of single layers or kv heads.
        chosen: What their sum is at the chosen thresholds.
        uniform: What it is at the one threshold for all layers with the same sparsity.
    """

    measured: Sensitivity
    chosen: float
    uniform: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        config: The setting, with the chosen thresholds.
        sparsity: Prefill sparsity that it has on the text's windows.
        highest: Prefill sparsity if everything outside the exact window were held.
        length: Tokens of a window.
        windows: How many were recorded.
        curve: Sparsity over one threshold for all layers.
        recording: The curves of single layers and heads.
        divergence: What was measured for the cost ``"kl"``.
        loss: Losses of the held-back windows, where a loss was wanted.
    """

    config: DeltaConfig
    sparsity: float
    highest: float
    length: int
    windows: int
    curve: Curve
    recording: Recording
    divergence: Divergence | None = None
    loss: LossRise | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; curves over one threshold for all layers."""
        recording = self.recording
        layers = zip(recording.layers, recording.thresholds, recording.sparsity, strict=True)
        values: dict[str, Any] = {
            "delta": self.config.to_dict(),
            "sparsity": round(self.sparsity, 6),
            "highest_sparsity": round(self.highest, 6),
            "length": self.length,
            "windows": self.windows,
            "curve": {
                "thresholds": np.round(self.curve.thresholds, 6).tolist(),
                "sparsity": np.round(self.curve.sparsity, 6).tolist(),
            },
            "layers": [
                {
                    "layer": layer,
                    "thresholds": np.round(thresholds, 6).tolist(),
                    "sparsity_of_heads": np.round(sparsity, 6).tolist(),
                }
                for layer, thresholds, sparsity in layers
            ],
        }
        if self.divergence is not None:
            measured = self.divergence.measured
            values["kl"] = {
                "windows": measured.windows,
                "chosen": round(self.divergence.chosen, 8),
                "uniform": round(self.divergence.uniform, 8),
            }
            for i, layer in enumerate(values["layers"]):
                layer["kl"] = {
                    "thresholds": np.round(measured.thresholds[i], 6).tolist(),
                    "alone": np.round(measured.divergence[i], 8).tolist(),
                    "nothing_held": round(float(measured.stored[i]), 8),
                }
        if self.loss is not None:
            values["loss"] = {"dense": self.loss.dense, "delta": self.loss.delta}
        return values


def calibrate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    text: str | Sequence[int],
    *,
    sparsity: float | None = None,
    loss: float | None = None,
    length: int | None = None,
    windows: int | None = None,
    per: Per = "layer",
    cost: Cost | None = None,
    mode: ThresholdMode | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Choose thresholds for a wanted prefill sparsity, or a wanted rise of the loss.

    The model itself is not changed; its setting gives window, block size, sinks and storage.

    Args:
        model: From :func:`mlx_delta.load`, with the delta.
        tokenizer: From :func:`mlx_delta.load`.
        text: What to calibrate on, or its token ids.
        sparsity: Wanted share of QK^T's multiply-accumulates that a prompt of ``length`` skips.
        loss: Instead of it: how much the loss may rise, in nats per token. Held to on a third of
            the windows, which are not used for anything else.
        length: Tokens of a window; 2,048 or the model's context if not given.
        windows: At most so many, spread evenly over the text; 8 if not given, of which 2 serve for
            the cost ``"kl"``.
        per: What gets a threshold of its own: the whole ``"model"``, a ``"layer"``, a ``"head"``.
        cost: By what skipping is shared out. ``"kl"``, the default: the KL divergence of the
            model's output with one layer or kv head held alone, a pass over every window for each
            of them and each of seven thresholds. ``"attention"``: the error of its attention, in
            the one pass that records, which knows nothing of the layers after it. Not for
            ``per="model"``, which has nothing to share out.
        mode: Of the thresholds; the setting's own if not given.
        seed: Of the choice of queries, for the cost ``"attention"``.
        progress: Show progress on stderr.

    Raises:
        ValueError: A wish that can't be fulfilled, a text that is too short, or an argument out
            of range.
    """
    base = getattr(getattr(model, "args", None), "delta", None)
    if base is None:
        raise ValueError("[calibrate] the model attends densely; load it with a DeltaConfig.")
    if per not in ("model", "layer", "head"):
        raise ValueError(f"[calibrate] per must be 'model', 'layer' or 'head' but got {per!r}.")
    if cost not in (None, "kl", "attention"):
        raise ValueError(f"[calibrate] cost must be 'kl' or 'attention' but got {cost!r}.")
    if cost is not None and per == "model":
        raise ValueError(
            f"[calibrate] cost is {cost!r} but one threshold for all layers leaves nothing to "
            "share out; drop --cost or --uniform."
        )
    if base.cuts_runs:
        base = base.changed(threshold_mode=mode or "relative", threshold=1.0)
    elif mode is not None:
        base = dataclasses.replace(base, threshold_mode=mode)
    length = check_length(length, context_length(model), base)
    check_wish(sparsity, loss, base, length)
    parts = cut_windows(tokenizer, text, length, WINDOWS if windows is None else windows)
    recorded, held_back = parts, []
    if loss is not None:
        if len(parts) < 2:
            raise ValueError(
                f"[calibrate] a loss needs two windows of {length} tokens but the text has "
                "one; give a longer --text or a smaller --length."
            )
        held_back = parts[2::3] or parts[1:]
        recorded = [part for part in parts if not any(part is other for other in held_back)]

    with ProgressBar(len(recorded), "recording", progress) as bar:
        recording = record(model, recorded, base, np.random.default_rng(seed), bar)
    measured = None
    if per != "model" and cost != "attention":
        count = min(len(recorded), KL_WINDOWS if windows is None else windows)
        scored = [recorded[i * len(recorded) // count] for i in range(count)]
        measured = _measure(model, scored, base, recording, per, progress)
    family = Family(base, recording, len(model.make_cache()), per, measured)
    found = None
    if loss is None:
        assert sparsity is not None
        wanted = sparsity
    else:
        with ProgressBar((BISECTIONS + 3) * len(held_back), "measuring losses", progress) as bar:
            wanted, found = _within_loss(model, held_back, family, loss, bar)
    config = family.setting(wanted)
    divergence = None
    if measured is not None:
        settings = config, family.uniform_setting(wanted)
        divergence = Divergence(measured, *map(family.divergence_of, settings))
    return Calibration(
        config=config,
        sparsity=family.sparsity_of(config),
        highest=highest_sparsity(base, length),
        length=length,
        windows=len(recorded),
        curve=family.uniform,
        recording=recording,
        divergence=divergence,
        loss=found,
    )


def check_wish(
    sparsity: float | None, loss: float | None, config: DeltaConfig, length: int
) -> None:
    """Refuse what nobody can calibrate to.

    Raises:
        ValueError: Neither or both are given, or one is out of range.
    """
    if (sparsity is None) == (loss is None):
        raise ValueError("[calibrate] give either a wanted sparsity or a wanted loss.")
    if loss is not None and not (math.isfinite(loss) and loss >= 0):
        raise ValueError(f"[calibrate] loss, in nats per token, must be >= 0 but got {loss}.")
    if sparsity is None:
        return
    if not 0 <= sparsity <= 1:
        raise ValueError(f"[calibrate] sparsity must be between 0 and 1 but got {sparsity}.")
    highest = highest_sparsity(config, length)
    if sparsity > highest:
        raise ValueError(beyond(sparsity, length, highest))


def _measure(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    base: DeltaConfig,
    recording: Recording,
    per: Per,
    progress: bool,
) -> Sensitivity:
    """KL divergences of the recorded layers, or of their heads."""
    heads = recording.sparsity.shape[1] if per == "head" else None
    total = passes(len(recording.layers), heads or 1, len(windows), base)
    with ProgressBar(total, f"measuring {per}s", progress, "pass") as bar:
        return measure_sensitivity(model, windows, base, recording, heads, bar)


def _within_loss(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    family: Family,
    wanted: float,
    progress: Callable[[], None],
) -> tuple[float, LossRise]:
    """The highest sparsity at which the loss rises by at most ``wanted``, and the losses."""
    dense = mean_loss(model, windows, None, progress)
    losses: dict[float, float] = {}

    def rise(sparsity: float) -> float:
        losses[sparsity] = mean_loss(model, windows, family.setting(sparsity), progress)
        return losses[sparsity] - dense

    sparsity = sparsest_within(rise, wanted, family.highest, BISECTIONS)
    if sparsity not in losses:
        rise(sparsity)  # nothing held: no more than rounding
    return sparsity, LossRise(dense, losses[sparsity])
