"""What a :class:`mlx_delta.DeltaConfig` may hold; every message names field and value."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from .sensitivities import Sensitivities
from .widths import LANE_WIDTHS, VALUE_WIDTHS, rows_of

if TYPE_CHECKING:
    from .config import DeltaConfig

MODES = ("optimal", "greedy", "relative", "absolute")
LONGEST_BLOCK = 64  # that runs are cut in: the work for a token grows with it
KEY_FORMATS = ("held", "codes", "deltas")
VALUE_FORMATS = ("plain", "rotated")
MEAN_BITS = (2, 8)  # of codes, from the least to the most
TILE_SIZES = (32, 64, 128)  # blocks whose tiles can be chosen
# Tokens that a window, a block or the sinks may span: buffers of their size are made.
MAX_TOKENS = 1 << 24
# Larger thresholds hold everything already, and every type of float holds this one.
LARGEST = 1e30


def shown(value: Any) -> str:
    """A value for an error message, cut short: a file may hold anything."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep list
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_setting(config: DeltaConfig) -> None:
    """Refuse a setting with a value that is wrong, alone or beside the others.

    Raises:
        ValueError: There is one.
    """
    if config.threshold_mode not in MODES:
        raise ValueError(
            f"[DeltaConfig] threshold_mode must be one of {', '.join(map(repr, MODES))} but "
            f"got {shown(config.threshold_mode)}."
        )
    for name, least in (("block_size", 1), ("window", 0), ("sinks", 0)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"[DeltaConfig] {name} must be a whole number but got {shown(value)}.")
        if value < least:
            raise ValueError(f"[DeltaConfig] {name} must be >= {least} but got {shown(value)}.")
        if value > MAX_TOKENS:
            raise ValueError(
                f"[DeltaConfig] {name} must be <= {MAX_TOKENS} but got {shown(value)}."
            )
    if config.window % config.block_size:
        raise ValueError(
            f"[DeltaConfig] window must be a multiple of block_size ({config.block_size}) but "
            f"got {config.window}."
        )
    if not isinstance(config.keyframes, bool):
        raise ValueError(
            f"[DeltaConfig] keyframes must be true or false but got {shown(config.keyframes)}."
        )
    _check_run_value(config)
    if config.cuts_runs:
        _check_runs(config)
    else:
        _check_threshold(config)
    if config.block_fraction is not None:
        fraction = config.block_fraction
        is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not is_number or not 0 < fraction <= 1:
            raise ValueError(
                f"[DeltaConfig] block_fraction must be in (0, 1] but got {shown(fraction)}."
            )
        if config.window:
            raise ValueError(
                f"[DeltaConfig] block_fraction needs window=0 but got window={config.window}."
            )
    _check_storage(config)
    _check_prefill(config)
    _check_size(config)


def _check_run_value(config: DeltaConfig) -> None:
    """Validate what runs are held as."""
    if config.run_value not in ("mean", "first"):
        raise ValueError(
            f"[DeltaConfig] run_value must be 'mean' or 'first' but got {shown(config.run_value)}."
        )
    if config.run_value == "mean" and not config.keyframes:
        raise ValueError(
            "[DeltaConfig] keyframes=False needs run_value='first' but got run_value='mean': "
            "the mean of a run that goes on in the next block is not known yet."
        )


def _check_threshold(config: DeltaConfig) -> None:
    """Validate what the modes with a threshold take."""
    for name in ("level", "sensitivities"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"[DeltaConfig] {name} needs threshold_mode 'optimal' or 'greedy' but got "
                f"{shown(config.threshold_mode)}."
            )
    layers = config.threshold if isinstance(config.threshold, tuple) else (config.threshold,)
    heads = [layer if isinstance(layer, tuple) else (layer,) for layer in layers]
    if not all([layers, *heads]):
        raise ValueError("[DeltaConfig] threshold must not be or contain an empty list.")
    for value in itertools.chain(*heads):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"[DeltaConfig] threshold must be a number but got {shown(value)}.")
        if not 0 <= value <= LARGEST:  # false for NaN too
            raise ValueError(f"[DeltaConfig] threshold must be >= 0 but got {shown(value)}.")


def _check_runs(config: DeltaConfig) -> None:
    """Validate what the modes that cut runs take."""
    mode = config.threshold_mode
    if config.threshold is not None:
        raise ValueError(
            f"[DeltaConfig] threshold_mode={mode!r} takes a level instead of a threshold but "
            f"got threshold={shown(config.threshold)}."
        )
    level = config.level
    if level is not None:
        if isinstance(level, bool) or not isinstance(level, (int, float)):
            raise ValueError(f"[DeltaConfig] level must be a number but got {shown(level)}.")
        if not 0 <= level <= LARGEST:  # false for NaN too
            raise ValueError(f"[DeltaConfig] level must be >= 0 but got {shown(level)}.")
    given: Any = config.sensitivities
    if given is not None and not isinstance(given, (Sensitivities, str)):
        raise ValueError(
            "[DeltaConfig] sensitivities must be Sensitivities or the name of a file but got "
            f"{shown(given)}."
        )
    if not config.keyframes or config.run_value != "mean" or config.block_fraction is not None:
        raise ValueError(
            f"[DeltaConfig] threshold_mode={mode!r} needs keyframes=True, run_value='mean' and "
            "no block_fraction: runs are cut within a block that is known. Give "
            "threshold_mode='relative' or 'absolute'."
        )
    if config.block_size > LONGEST_BLOCK:
        raise ValueError(
            f"[DeltaConfig] threshold_mode={mode!r} needs a block_size of at most "
            f"{LONGEST_BLOCK} but got {config.block_size}."
        )


def _check_storage(config: DeltaConfig) -> None:
    """Validate how keys and values are stored."""
    for name, known in (("key_format", KEY_FORMATS), ("value_format", VALUE_FORMATS)):
        value = getattr(config, name)
        if value not in known:
            raise ValueError(
                f"[DeltaConfig] {name} must be one of {', '.join(map(repr, known))} but got "
                f"{shown(value)}."
            )
    blocks = config.keyframes and config.block_fraction is None
    if config.key_bits is not None and not blocks:
        raise ValueError(
            f"[DeltaConfig] key_bits={shown(config.key_bits)} needs keyframes=True and a fixed "
            "block_size: stored blocks are read independently of each other."
        )
    if config.key_format == "deltas" and not config.cuts_runs:
        raise ValueError(
            "[DeltaConfig] key_format='deltas' needs threshold_mode 'optimal' or 'greedy' but got "
            f"{shown(config.threshold_mode)}; give key_format='codes', or leave key_bits out."
        )
    if config.key_format != "held":
        _check_mean("key_bits", config.key_bits, config.key_format)
    if config.value_format != "plain":
        _check_mean("value_bits", config.value_bits, config.value_format)
        if config.key_bits is None:
            raise ValueError(
                f"[DeltaConfig] value_bits={shown(config.value_bits)} needs key_bits but got None: "
                "values are codes where keys are; give key_bits, or value_bits=16."
            )
    _check_widths(config)
    if config.key_bits is not None and (config.block_size % 8 or config.block_size > 64):
        raise ValueError(
            f"[DeltaConfig] key_bits={config.key_bits} needs a block_size that is a multiple "
            f"of 8, up to 64, but got {config.block_size}."
        )


def _check_widths(config: DeltaConfig) -> None:
    """Validate widths that were chosen for codes."""
    kinds = {"key_widths": config.key_format, "value_widths": "values"}
    coded = {
        "key_widths": config.key_format != "held",
        "value_widths": config.value_format != "plain",
    }
    for name, kind in kinds.items():
        value = getattr(config, name)
        if value is None:
            continue
        fits = coded[name] and isinstance(value, tuple)
        if not fits or not all(x is None or _fits_layer(kind, x) for x in value):
            raise ValueError(
                f"[DeltaConfig] {name} must be widths of codes, for each layer those of its kv "
                f"heads, but got {shown(value)}."
            )


def _check_mean(name: str, value: Any, kind: str) -> None:
    least, most = MEAN_BITS if kind != "deltas" else (LANE_WIDTHS[0], LANE_WIDTHS[-1])
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        which = f"{name.removesuffix('_bits')}_format={kind!r}"
        codes = is_number and kind == "deltas" and most < value <= MEAN_BITS[1]
        other = f"; key_format='codes' takes up to {MEAN_BITS[1]}" if codes else ""
        raise ValueError(
            f"[DeltaConfig] {name} must be between {least} and {most}, with {which}, but got "
            f"{shown(value)}{other}."
        )


def _fits_layer(kind: str, widths: Any) -> bool:
    """Whether these are widths of the codes of a layer: of values, or of keys in a format."""
    if not isinstance(widths, tuple) or not widths:
        return False
    if kind == "values":
        return all(type(width) is int and width in VALUE_WIDTHS for width in widths)
    if kind == "deltas":
        known = set(map(str, LANE_WIDTHS.tolist()))
        if not all(isinstance(head, str) and head and set(head) <= known for head in widths):
            return False
        counts = [head.count(width) for head in widths for width in set(head)]
        return len(set(map(len, widths))) == 1 and not any(count % 8 for count in counts)
    if not all(isinstance(head, str) and rows_of(head) is not None for head in widths):
        return False
    return len(set(map(len, widths))) == 1


def _check_prefill(config: DeltaConfig) -> None:
    """Validate which part of a prompt's attention is computed."""
    if config.prefill not in ("exact", "tiles"):
        raise ValueError(
            f"[DeltaConfig] prefill must be 'exact' or 'tiles' but got {shown(config.prefill)}."
        )
    shares = config.tiles if isinstance(config.tiles, tuple) else (config.tiles,)
    if not shares:
        raise ValueError("[DeltaConfig] tiles must not be an empty list.")
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"[DeltaConfig] tiles must be in [0, 1] but got {shown(share)}.")
    if config.prefill == "exact":
        return
    if config.block_fraction is not None or config.block_size not in TILE_SIZES:
        raise ValueError(
            f"[DeltaConfig] prefill='tiles' needs a block_size of {', '.join(map(str, TILE_SIZES))}"
            f" but got block_size={config.block_size}, block_fraction={config.block_fraction}."
        )


def _check_size(config: DeltaConfig) -> None:
    """Validate how many tokens are kept."""
    size = config.max_size
    if size is None:
        return
    if config.block_fraction is not None:
        raise ValueError(
            f"[DeltaConfig] max_size={shown(size)} needs a fixed block_size but got "
            f"block_fraction={config.block_fraction}: whole blocks are dropped."
        )
    if type(size) is not int or not config.least_size <= size <= MAX_TOKENS:
        raise ValueError(
            f"[DeltaConfig] max_size must be a whole number from {config.least_size} (the sinks' "
            f"block, the window and three blocks) to {MAX_TOKENS} but got {shown(size)}."
        )
