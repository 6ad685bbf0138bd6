"""Timing settings side by side on one model, and computing what a chip's bandwidth allows.

The command line (``python -m mlx_delta.benchmark``) is beside it; see ``--help``.
"""

from mlx_delta.measure.roofline import Ceiling, ceilings

from .timing import Benchmark, Row, Run, Spread, Tail

__all__ = ["Benchmark", "Ceiling", "Row", "Run", "Spread", "Tail", "ceilings"]
