"""Measuring what a way to keep keys and values saves and costs, on any model and text.

``recall.py``, ``language.py`` and ``harness.py`` measure, ``results.py`` keeps what they found, and
the command line (``python -m mlx_delta.evaluate``) is beside them.
"""

from __future__ import annotations

from mlx_delta.measure.text import BUNDLED_TEXT, read_text

from .language import (
    LanguageOptions,
    make_windows,
    measure_window,
    summarize_kld,
    summarize_perplexity,
)
from .recall import RecallOptions, RecallTask, measure_sample, summarize_recall

__all__ = [
    "BUNDLED_TEXT",
    "LanguageOptions",
    "RecallOptions",
    "RecallTask",
    "make_windows",
    "measure_sample",
    "measure_window",
    "read_text",
    "summarize_kld",
    "summarize_perplexity",
    "summarize_recall",
]
