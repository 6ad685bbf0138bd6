"""Stages by the clock: each ends when recall has come, or when its share of the time is over."""

from __future__ import annotations

from dataclasses import dataclass

from data import Mix


@dataclass(kw_only=True)
class TimedStage(Mix):
    """A stage that lasts for a share of the time; see `recipe_gpu.toml`."""

    until: float
    least: float = 0.0
    gate_length: int | None = None
    gate_recall: float = 1.0


class Schedule:
    """Which stage it is.

    Args:
        stages: One after the other.
        max_length: Longer sequences are cut to this, for trials and smaller contexts.
    """

    def __init__(self, stages: list[TimedStage], max_length: int):
        self.stages, self.index, self.entered = stages, 0, 0.0
        for stage in stages:
            shares: dict[str, float] = {}
            for length, share in stage.lengths.items():
                length = str(min(int(length), max_length))
                shares[length] = shares.get(length, 0.0) + share
            stage.lengths = shares
            if stage.gate_length is not None:
                stage.gate_length = min(stage.gate_length, max_length)

    @property
    def stage(self) -> TimedStage:
        """The stage it is."""
        return self.stages[self.index]

    @property
    def lengths(self) -> list[int]:
        """All lengths of sequences, of all stages."""
        return sorted({int(length) for stage in self.stages for length in stage.lengths})

    def advance(self, done: float, recall: dict[int, float]) -> bool:
        """Go on to the next stage if it is time; whether it was.

        Args:
            done: The share of the time that is over.
            recall: The recall in training at each length, since the stage began.
        """
        stage = self.stage
        reached = (
            stage.gate_length is not None
            and recall.get(stage.gate_length, 0.0) >= stage.gate_recall
            and done - self.entered >= stage.least
        )
        if self.index + 1 == len(self.stages) or not (reached or done >= stage.until):
            return False
        self.index, self.entered = self.index + 1, done
        return True


def learning_rate(step: int, done: float, warmup: int, decay_from: float) -> float:
    """The factor of the learning rates: up in `warmup` steps, flat, then straight down.

    Args:
        step: Steps taken.
        done: The share of the time that is over, up to 1.
        warmup: Steps.
        decay_from: The share of the time after which it falls.
    """
    factor = min(1.0, (step + 1) / warmup)
    if done > decay_from:
        factor *= max(0.005, (1 - done) / (1 - decay_from))
    return factor
