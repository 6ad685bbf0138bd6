"""How fast a chip could decode at most: its bandwidth / the bytes that a token reads.

Computed, not measured. Bytes come from caches filled with a real text, so they hold what the
settings really store of it; contexts beyond the longest one filled are extrapolated in a straight
line, as if the text went on alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from tqdm import tqdm

from mlx_delta.system.chips import REACHED, Chip, physical_memory

from .filling import check_context, memory_needed, prefill
from .settings import PREFILL_STEP, Setting
from .traffic import decode_traffic, weight_bytes

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SETTINGS = (
    *("dense", "delta", "delta:kv=balanced", "delta:kv=small", "kv8", "kv4", "rotating:1024"),
)


@dataclass(frozen=True)
class Ceiling:
    """What a token reads with a setting at a context.

    Attributes:
        setting: The setting's name.
        context: Tokens in the cache.
        weight_bytes: Of weights read.
        cache_bytes: Of keys and values read.
        extrapolated: Whether the caches were filled to a shorter context only.
    """

    setting: str
    context: int
    weight_bytes: int
    cache_bytes: int
    extrapolated: bool

    @property
    def bytes(self) -> int:
        """All bytes read."""
        return self.weight_bytes + self.cache_bytes

    def tokens_per_second(self, chip: Chip) -> float:
        """The ceiling: all of the chip's bandwidth."""
        return chip.gb_per_s * 1e9 / self.bytes

    def expected(self, chip: Chip) -> tuple[float, float]:
        """What is reached in practice, from and to."""
        ceiling = self.tokens_per_second(chip)
        return ceiling * REACHED[0], ceiling * REACHED[1]


def ceilings(
    model: nn.Module,
    settings: Sequence[Setting],
    tokens: Sequence[int],
    contexts: Sequence[int],
    longest: int,
    prefill_step: int = PREFILL_STEP,
    progress: bool = False,
) -> list[Ceiling]:
    """What a token reads, for every context and setting.

    Args:
        model: From :func:`mlx_delta.load`, with a delta.
        settings: Ways to keep keys and values.
        tokens: A text of at least ``longest`` tokens.
        contexts: In tokens.
        longest: The longest context to fill caches to, within the model's; beyond it bytes are
            extrapolated.
        prefill_step: Tokens of a prompt at a time.
        progress: Whether to show a bar.

    Raises:
        ValueError: There is no setting or too little text, or ``longest`` is too long or short.
        MemoryError: Caches filled to ``longest`` are more than this machine holds.
    """
    if not settings:
        raise ValueError("[ceilings] settings is empty; name at least one, such as 'dense'.")
    check_context("ceilings", model, longest)
    if longest > len(tokens):
        raise ValueError(
            f"[ceilings] longest must be <= the {len(tokens)} tokens of the text but got {longest}."
        )
    for setting in settings:
        needed = memory_needed(model, setting, longest, prefill_step)
        if needed > physical_memory():
            raise MemoryError(
                f"[ceilings] filling caches to {longest} tokens takes about {needed / 1e9:.0f} GB "
                f"with {setting.name} and this machine has {physical_memory() / 1e9:.0f} GB; fill "
                "fewer (--longest), and the rest is extrapolated."
            )
    weights = weight_bytes(model)
    found: dict[tuple[int, str], Ceiling] = {}
    with tqdm(total=len(settings), unit="setting", disable=None if progress else True) as bar:
        for setting in settings:
            bar.set_description(setting.name)
            within = [context for context in contexts if context <= longest]
            beyond = [context for context in contexts if context > longest]
            ends = _line_ends(setting, longest) if beyond else ()
            filled = sorted({*within, *ends})
            read = _fill(model, setting, tokens, filled, prefill_step)
            for context in contexts:
                if context <= longest:
                    size = read[context]
                else:
                    size = extrapolate(
                        [(_kept(setting, end), read[end]) for end in ends], _kept(setting, context)
                    )
                found[context, setting.name] = Ceiling(
                    setting.name, context, weights, size, context > longest
                )
            bar.update()
    return [found[context, setting.name] for context in contexts for setting in settings]


def extrapolate(points: Sequence[tuple[int, int]], x: int) -> int:
    """The straight line through two points, at x; level through points with the same x."""
    (x1, y1), (x2, y2) = points
    if x1 == x2:
        return y2
    return round(y2 + (y2 - y1) * (x - x2) / (x2 - x1))


def _kept(setting: Setting, context: int) -> int:
    """Tokens that a cache keeps."""
    return context if setting.max_size is None else min(context, setting.max_size)


def _line_ends(setting: Setting, longest: int) -> tuple[int, int]:
    """Two contexts to draw the line through: half the longest, and the longest.

    Whole blocks, so that as many keys are in the window at both; far keys are then all that
    differs, and what is constant (window, sinks) is in both.

    Raises:
        ValueError: The shorter one has no far keys.
    """
    delta = setting.delta
    size = 1 if delta is None or delta.block_fraction is not None else delta.block_size
    window = 0 if delta is None else delta.window
    ends = longest // 2 // size * size, longest // size * size
    if ends[0] <= window + size:
        raise ValueError(
            f"[ceilings] longest must be more than {2 * (window + 2 * size)} for {setting.name} "
            f"to be extrapolated from but got {longest}."
        )
    return ends


def _fill(
    model: nn.Module,
    setting: Setting,
    tokens: Sequence[int],
    contexts: Sequence[int],
    prefill_step: int,
) -> dict[int, int]:
    """Bytes that a token reads of caches filled to each of the ascending contexts."""
    caches: list[Any] = setting.make_caches(model, contexts[-1])
    read, done = {}, 0
    for context in contexts:
        prefill(model, setting, tokens[done:context], caches, prefill_step)
        read[context] = decode_traffic(model, caches).cache_bytes
        done = context
    return read


def roofline_values(ceilings: Sequence[Ceiling], chips: Sequence[Chip]) -> list[dict[str, Any]]:
    """Decode ceilings as plain JSON values, in tokens per second by chip."""
    return [
        {
            "setting": ceiling.setting,
            "context": ceiling.context,
            "extrapolated": ceiling.extrapolated,
            "weight_bytes": ceiling.weight_bytes,
            "cache_bytes": ceiling.cache_bytes,
            "bytes": ceiling.bytes,
            "ceilings": {chip.label: ceiling.tokens_per_second(chip) for chip in chips},
        }
        for ceiling in ceilings
    ]
