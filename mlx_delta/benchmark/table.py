"""Results as tables, in plain text or Markdown, and as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_delta.measure.roofline import Ceiling
from mlx_delta.measure.table import Table
from mlx_delta.system.chips import REACHED, Chip

from .timing import Row, Spread, Tail


def timing_tables(rows: Sequence[Row], chip: Chip | None) -> list[Table]:
    """What was timed, a table for each context; rows without runs are left out."""
    header = ["setting", "prefill tok/s", "decode tok/s", "first token s", "n", "ms/token"]
    header += ["peak MB", "prompt MB", "cache MB", "MB/token", "MMAC/token", "ops/token"]
    timed = [row for row in rows if row.runs]
    tiles = any(row.density is not None for row in timed)
    scratch = any(row.scratch_bytes for row in timed)
    if scratch:
        header.insert(header.index("cache MB") + 1, "written out MB")
    if tiles:
        header.append("tiles")
    if chip is not None:
        header.append(f"of {chip.gb_per_s:g} GB/s")
    tables = []
    for context in dict.fromkeys(row.context for row in timed):
        members = [row for row in timed if row.context == context]
        generated = members[0].generated
        caption = f"{context} tokens: {context - generated} of prompt, {generated} generated"
        lines = [_timing_line(row, chip, tiles, scratch) for row in members]
        tables.append(Table(caption, header, lines))
    return tables


def _timing_line(row: Row, chip: Chip | None, tiles: bool, scratch: bool) -> list[str]:
    assert row.traffic is not None
    cells = [
        row.setting.name,
        format_spread(row.prefill_speed),
        format_spread(row.decode_speed),
        format_spread(row.first_token),
        f"{len(row.runs)}",
        format_tail(row.token_seconds, 1000),
        f"{row.peak_bytes / 1e6:.1f}",
        f"{row.prompt_bytes / 1e6:.1f}",
        f"{row.cache_bytes / 1e6:.2f}",
        *([f"{row.scratch_bytes / 1e6:.2f}"] if scratch else []),
        f"{row.traffic.bytes / 1e6:.2f}",
        f"{row.traffic.macs / 1e6:.2f}",
        format_tail(row.token_operations),
    ]
    if tiles:
        cells.append("–" if row.density is None else f"{row.density:.3f}")
    if chip is not None:
        cells.append(f"{row.bandwidth_share(chip.gb_per_s):.0%}")
    return cells


def format_spread(spread: Spread, scale: float = 1) -> str:
    """``median [lower quartile, upper quartile]``."""
    digits = _digits(spread.median * scale)
    median, low, high = (f"{x * scale:.{digits}f}" for x in (spread.median, spread.q1, spread.q3))
    return f"{median} [{low}, {high}]"


def format_tail(tail: Tail, scale: float = 1) -> str:
    """``median / 95th percentile / most``."""
    digits = 0 if scale == 1 else _digits(tail.median * scale)
    values = (tail.median, tail.p95, tail.greatest)
    return " / ".join(f"{value * scale:.{digits}f}" for value in values)


def _digits(value: float) -> int:
    """Decimals to print, so that a number has three digits at least."""
    return next((d for least, d in ((100, 0), (10, 1), (1, 2)) if value >= least), 3)


def timing_notes(unpacks: bool, tiles: bool = False) -> list[str]:
    """What the columns of the timed tables mean.

    Args:
        unpacks: Whether stored keys were timed without the kernel that reads them.
        tiles: Whether a prefill by tiles was timed.
    """
    notes = [
        "Speeds and times: median [quartiles] of n runs taking turns; prefill ends with the first "
        "token.",
        "ms/token and ops/token: median / 95th percentile / most of the tokens after the first; a "
        "token that finishes a block encodes its keys as well.",
        "Computed for the last token, not measured: MB/token, weights and cache read; MMAC/token, "
        "multiply-accumulates, without those of zero deltas, which no kernel skips yet.",
        "ops/token: operations in MLX's graphs of as many tokens as were generated, views left "
        "out; on a GPU about as many launches.",
        "cache MB: allocated, floats at 16 bits. peak MB: all that MLX held, weights included. "
        "prompt MB: the most while the prompt was read, above the weights.",
    ]
    if tiles:
        notes.append(
            "tiles: the part of a prompt's attention that was computed, of the queries that chose."
        )
    if unpacks:
        notes.append(
            "Without a GPU stored keys and values are kept written out while tokens are decoded, "
            "up to 32 MiB of a layer (written out MB, besides the caches); with it their attention "
            "is 2 launches per layer."
        )
    return notes


def timing_values(rows: Sequence[Row], chip: Chip | None) -> list[dict[str, Any]]:
    """What was timed as plain JSON values."""
    values = []
    for row in rows:
        if not row.runs:
            continue
        assert row.traffic is not None
        entry: dict[str, Any] = {
            "setting": row.setting.name,
            "context": row.context,
            "prompt_tokens": row.prompt,
            "generation_tokens": row.generated,
            "prompt_tps": row.prefill_speed.to_dict(),
            "generation_tps": row.decode_speed.to_dict(),
            "first_token_seconds": row.first_token.to_dict(),
            "peak_memory_bytes": row.peak_bytes,
            "prompt_memory_bytes": row.prompt_bytes,
            "cache_bytes": row.cache_bytes,
            "scratch_bytes": row.scratch_bytes,
            "token_seconds": row.token_seconds.to_dict(),
            "traffic_per_token": row.traffic.to_dict(),
            "operations_per_token": row.token_operations.to_dict(),
            "tile_density": row.density,
            "runs": [
                {"first_token_seconds": run.first_token, "decode_seconds": run.decode}
                for run in row.runs
            ],
        }
        if chip is not None:
            entry["bandwidth_share"] = row.bandwidth_share(chip.gb_per_s)
        values.append(entry)
    return values


def roofline_tables(ceilings: Sequence[Ceiling], chips: Sequence[Chip]) -> list[Table]:
    """Decode ceilings, a table for each family of chips and each context."""
    tables = []
    for family in dict.fromkeys(chip.family for chip in chips):
        members = [chip for chip in chips if chip.family == family]
        header = ["setting", "cache MB", "MB/token"]
        header += [f"{chip.label}, {chip.gb_per_s:g} GB/s" for chip in members]
        for context in dict.fromkeys(ceiling.context for ceiling in ceilings):
            rows = [c for c in ceilings if c.context == context]
            caption = f"{family}, computed ceiling of decode at {context} tokens, tok/s"
            if rows[0].extrapolated:
                caption += " (extrapolated)"
            tables.append(Table(caption, header, [_roofline_line(c, members) for c in rows]))
    return tables


def _roofline_line(ceiling: Ceiling, chips: Sequence[Chip]) -> list[str]:
    cells = [
        ceiling.setting,
        f"{ceiling.cache_bytes / 1e6:.2f}",
        f"{ceiling.bytes / 1e6:.2f}",
    ]
    for chip in chips:
        low, high = ceiling.expected(chip)
        cells.append(f"{_number(ceiling.tokens_per_second(chip))} ({_number(low)}-{_number(high)})")
    return cells


def _number(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def roofline_notes(ceilings: Sequence[Ceiling], longest: int) -> list[str]:
    """What the columns of the ceilings' tables mean.

    Args:
        ceilings: The ceilings.
        longest: The longest context to which caches were filled.
    """
    low, high = REACHED
    notes = [
        "Computed, not measured: bandwidth / bytes read per token (weights and cache). In brackets "
        f"{low:.0%} to {high:.0%} of it, which is what decoding reaches in practice.",
        "Bytes are those of caches filled with a text, floats at 16 bits where there is no GPU. A "
        "model of a few MB stays in a chip's own cache, and launches take longer than reading it: "
        "its ceiling says nothing about its speed.",
    ]
    if any(ceiling.extrapolated for ceiling in ceilings):
        notes.append(f"Extrapolated: from caches filled to {longest} tokens.")
    return notes
