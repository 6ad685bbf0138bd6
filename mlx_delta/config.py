"""The settings of hybrid delta attention: one documented, validated dataclass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ThresholdMode = Literal["relative", "absolute"]
RunValue = Literal["mean", "first"]
# One number; or for each layer one, or one for each of its kv heads.
Thresholds = float | tuple[float | tuple[float, ...], ...]

KEY_BITS = (16, 8, 4, 3, 2)
VALUE_BITS = (16, 8, 4)

# Tokens that a window, a block or the sinks may span: buffers of their size are made.
MAX_TOKENS = 1 << 24
# Larger thresholds hold everything already, and a float holds this one.
MAX_THRESHOLD = 1e30


@dataclass(frozen=True)
class DeltaConfig:
    """How keys outside the exact window are held, and how far the window reaches.

    Positions are cut into blocks of ``block_size`` by absolute position. A query sees the keys
    of its own block and of the ``window / block_size`` blocks before it exactly, and the held
    keys of every older block (DeltaLLM, arXiv 2507.19608, in a blocked form).

    Args:
        threshold: A key value is held until it has changed by more than the threshold. Either
            one number, or one for each layer, which may itself be a tuple with one for each of
            the layer's kv heads. 0 holds nothing that has changed.
        threshold_mode: ``"relative"``: the threshold of a block and kv head is ``threshold``
            times the root mean square of the block's keys around their mean, so it needs no
            calibration. ``"absolute"``: ``threshold`` itself, in units of the keys (the paper).
        block_size: Tokens in a block.
        window: Tokens before the query's own block that stay exact; a multiple of
            ``block_size``. The exact span is ``window`` to ``window + block_size`` tokens.
        sinks: Keys at the start of the text that always stay exact.
        keyframes: Whether the hold starts anew with each block, which makes blocks independent
            of each other. ``False`` runs one chain over the whole text, as in the paper.
        run_value: What the values of a run are held as; a run is a value that propagated and
            those after it that did not. ``"mean"``: their mean, which has the smallest squared
            error, and is known when a block is encoded. A run that starts at a sink keeps its
            first value. ``"first"``: the value that propagated (the paper). The same values
            propagate either way. Runs that cross blocks (``keyframes=False``) need ``"first"``.
        block_fraction: When set, ``block_size`` is not used as given but becomes this fraction
            of the prompt's length once the prompt is seen (the paper's 5 % window). Needs
            ``window=0``, the block-diagonal form.
        key_bits: How held keys are stored. ``None``: in full, as long as the text (fast without
            a GPU, saves no memory). 16: packed, only the values that changed, in 16 bits each.
            8, 4, 3 or 2: packed, and those values as codes of so many bits on a grid of the
            block and channel. Packed keys need ``keyframes`` and a ``block_size`` that is a
            multiple of 8, up to 64; a float32 model's keys are rounded to float16.
        value_bits: How values (V) are stored. ``None``: in the model's type. 16: in 16 bits.
            8 or 4: as codes, in mlx-lm's own quantized form.

    Raises:
        ValueError: A value is out of range; the message names it.
    """

    threshold: Thresholds = 1.0
    threshold_mode: ThresholdMode = "relative"
    block_size: int = 64
    window: int = 64
    sinks: int = 4
    keyframes: bool = True
    run_value: RunValue = "mean"
    block_fraction: float | None = None
    key_bits: int | None = None
    value_bits: int | None = None

    def __post_init__(self) -> None:
        """Validate every field once, so that the code that uses them can trust them."""
        # JSON gives lists; tuples keep the configuration hashable.
        object.__setattr__(self, "threshold", _nested(self.threshold, tuple))
        layers = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        heads = [layer if isinstance(layer, tuple) else (layer,) for layer in layers]
        if not all([layers, *heads]):
            raise ValueError("[DeltaConfig] threshold must not be or contain an empty list.")
        for value in itertools.chain(*heads):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"[DeltaConfig] threshold must be a number but got {_shown(value)}."
                )
            if not 0 <= value <= MAX_THRESHOLD:  # false for NaN too
                raise ValueError(f"[DeltaConfig] threshold must be >= 0 but got {_shown(value)}.")
        if self.threshold_mode not in ("relative", "absolute"):
            raise ValueError(
                "[DeltaConfig] threshold_mode must be 'relative' or 'absolute' but got "
                f"{_shown(self.threshold_mode)}."
            )
        for name, least in (("block_size", 1), ("window", 0), ("sinks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(
                    f"[DeltaConfig] {name} must be a whole number but got {_shown(value)}."
                )
            if value < least:
                raise ValueError(
                    f"[DeltaConfig] {name} must be >= {least} but got {_shown(value)}."
                )
            if value > MAX_TOKENS:
                raise ValueError(
                    f"[DeltaConfig] {name} must be <= {MAX_TOKENS} but got {_shown(value)}."
                )
        if self.window % self.block_size:
            raise ValueError(
                f"[DeltaConfig] window must be a multiple of block_size ({self.block_size}) but "
                f"got {self.window}."
            )
        if not isinstance(self.keyframes, bool):
            raise ValueError(
                f"[DeltaConfig] keyframes must be true or false but got {_shown(self.keyframes)}."
            )
        self._check_run_value()
        if self.block_fraction is not None:
            fraction = self.block_fraction
            is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
            if not is_number or not 0 < fraction <= 1:
                raise ValueError(
                    f"[DeltaConfig] block_fraction must be in (0, 1] but got {_shown(fraction)}."
                )
            if self.window:
                raise ValueError(
                    f"[DeltaConfig] block_fraction needs window=0 but got window={self.window}."
                )
        self._check_storage()

    def _check_run_value(self) -> None:
        """Validate what runs are held as."""
        if self.run_value not in ("mean", "first"):
            raise ValueError(
                f"[DeltaConfig] run_value must be 'mean' or 'first' but got "
                f"{_shown(self.run_value)}."
            )
        if self.run_value == "mean" and not self.keyframes:
            raise ValueError(
                "[DeltaConfig] keyframes=False needs run_value='first' but got run_value='mean': "
                "the mean of a run that goes on in the next block is not known yet."
            )

    def _check_storage(self) -> None:
        """Validate how keys and values are stored."""
        for name, widths in (("key_bits", KEY_BITS), ("value_bits", VALUE_BITS)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value not in widths):
                known = ", ".join(map(str, widths))
                raise ValueError(
                    f"[DeltaConfig] {name} must be one of {known} but got {_shown(value)}."
                )
        if self.key_bits is None:
            return
        if not self.keyframes or self.block_fraction is not None:
            raise ValueError(
                f"[DeltaConfig] key_bits={self.key_bits} needs keyframes=True and a fixed "
                "block_size: packed blocks are read independently of each other."
            )
        if self.block_size % 8 or self.block_size > 64:
            raise ValueError(
                f"[DeltaConfig] key_bits={self.key_bits} needs a block_size that is a multiple "
                f"of 8, up to 64, but got {self.block_size}."
            )

    @classmethod
    def paper(cls, threshold: Thresholds = 0.6) -> DeltaConfig:
        """The paper's own setting, as far as it is public (arXiv 2507.19608).

        One chain over the whole text, an absolute threshold, runs held as their first value, a
        block-diagonal exact window of 5 % of the prompt, key 0 exact. The one to use on short
        prompts: with blocks and a window of 64 tokens nothing is skipped under 128 tokens.
        """
        return cls(
            threshold=threshold,
            threshold_mode="absolute",
            window=0,
            sinks=1,
            keyframes=False,
            run_value="first",
            block_fraction=0.05,
        )

    @property
    def window_blocks(self) -> int:
        """Blocks before the query's own block that stay exact."""
        return self.window // self.block_size

    def resolve(self, prompt_length: int) -> DeltaConfig:
        """The same setting with a fixed block size, for a prompt of ``prompt_length`` tokens."""
        if self.block_fraction is None:
            return self
        block_size = max(1, round(self.block_fraction * prompt_length))
        return dataclasses.replace(self, block_size=block_size, block_fraction=None)

    @property
    def layer_threshold(self) -> float | tuple[float, ...]:
        """The threshold of a setting of one layer; a tuple if its kv heads have their own."""
        if not isinstance(self.threshold, tuple):
            return self.threshold
        if len(self.threshold) > 1:
            raise ValueError("[DeltaConfig] thresholds per layer: call for_layer first.")
        return self.threshold[0]

    @property
    def head_threshold(self) -> float:
        """The threshold as one number; for settings of a single head."""
        threshold = self.layer_threshold
        if isinstance(threshold, tuple):
            raise ValueError("[DeltaConfig] thresholds per head: call for_head first.")
        return threshold

    def for_layer(self, layer: int, n_layers: int) -> DeltaConfig:
        """The setting of one layer, with that layer's own threshold.

        Thresholds of its heads stay in a tuple of one layer, ``((0.9, 1.1),)``, so that they are
        never taken for thresholds of layers.

        Raises:
            ValueError: There are thresholds for another number of layers.
        """
        if not isinstance(self.threshold, tuple):
            return self
        if len(self.threshold) != n_layers:
            raise ValueError(
                f"[DeltaConfig] threshold has {len(self.threshold)} values but the model has "
                f"{n_layers} layers."
            )
        own = self.threshold[layer]
        return dataclasses.replace(self, threshold=(own,) if isinstance(own, tuple) else own)

    def for_head(self, head: int) -> DeltaConfig:
        """The setting of one kv head; of a setting of one layer."""
        threshold = self.layer_threshold
        own = threshold[head] if isinstance(threshold, tuple) else threshold
        return dataclasses.replace(self, threshold=own)

    def check_heads(self, n_heads: int, layer: int | None = None) -> None:
        """Refuse a setting of one layer that does not fit its number of kv heads.

        Args:
            n_heads: The layer's kv heads.
            layer: Which layer it is, for the message.

        Raises:
            ValueError: There are thresholds for another number of heads.
        """
        own = self.layer_threshold
        if isinstance(own, tuple) and len(own) != n_heads:
            name = "a layer" if layer is None else f"layer {layer}"
            raise ValueError(
                f"[DeltaConfig] threshold has {len(own)} values for the heads of {name} but it "
                f"has {n_heads} kv heads."
            )

    def to_dict(self) -> dict[str, Any]:
        """The setting as plain JSON values, as stored under ``delta`` in a config.json."""
        values = dataclasses.asdict(self)
        values["threshold"] = _nested(self.threshold, list)
        optional = ("block_fraction", "key_bits", "value_bits")
        return {k: v for k, v in values.items() if k not in optional or v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeltaConfig:
        """The setting written by :meth:`to_dict`; keys left out take their defaults.

        Raises:
            ValueError: They are no mapping, an unknown key, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"[DeltaConfig] the settings must be an object but got {_shown(values)}."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - names))
        if unknown:
            raise ValueError(
                f"[DeltaConfig] unknown setting {_shown(unknown[0])}; known are "
                f"{', '.join(sorted(names))}."
            )
        return cls(**values)


def _nested(value: Any, kind: type) -> Any:
    """Lists and tuples within each other as lists or tuples throughout."""
    return kind(_nested(x, kind) for x in value) if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    """A value for an error message, cut short: a file may hold anything."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep list
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."
