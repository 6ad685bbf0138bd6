"""Llama with ternary layers (Falcon3-1.58, Falcon-E, HF1BitLLM) and hybrid delta attention."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_delta.ternary.model import TernaryArgs, TernaryModel

from . import llama


@dataclass
class ModelArgs(TernaryArgs, llama.ModelArgs):
    """The arguments of our Llama, and those of ternary layers."""

    def __post_init__(self) -> None:
        """Check them, and read the setting as it stands in a config.json."""
        self.check()
        super().__post_init__()


class Model(TernaryModel, llama.Model):
    """Our Llama, with ternary layers."""

    args: ModelArgs

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.make_ternary(args)
