"""The settings of hybrid delta attention: one documented, validated dataclass.

Over 400 lines: its fields belong together, and half of it says what they mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .config_checks import (
    KEY_FORMATS,
    MODES,
    VALUE_FORMATS,
    check_setting,
    shown,
)
from .notation import read_fields, write_fields
from .old_settings import modern_fields, say
from .sensitivities import Sensitivities
from .widths import (
    KeyWidths,
    ValueWidths,
    choose_key_widths,
    choose_lane_widths,
    choose_value_widths,
)

__all__ = [
    "KEY_FORMATS",
    "MODES",
    "RUN_MODES",
    "VALUE_FORMATS",
    "DeltaConfig",
    "KeyFormat",
    "RunValue",
    "ThresholdMode",
    "ValueFormat",
]

ThresholdMode = Literal["optimal", "greedy", "relative", "absolute"]
RunValue = Literal["mean", "first"]
Prefill = Literal["exact", "tiles"]
KeyFormat = Literal["held", "codes", "deltas"]
ValueFormat = Literal["plain", "rotated"]
# One number; or for each layer one, or one for each of its kv heads.
Thresholds = float | tuple[float | tuple[float, ...], ...]

RUN_MODES = ("optimal", "greedy")  # of which a level sets how much is held
# Of models that were not calibrated: in units of squared scores, so it suits all models alike.
DEFAULT_LEVEL = 0.03


@dataclass(frozen=True)
class DeltaConfig:
    """How keys outside the exact window are held, and how far the window reaches.

    Positions are cut into blocks of ``block_size`` by absolute position. A query sees the keys
    of its own block and of the ``window / block_size`` blocks before it exactly, and the held
    keys of every older block (DeltaLLM, arXiv 2507.19608, in a blocked form).

    Args:
        threshold: For the modes ``"relative"`` and ``"absolute"``, which it alone asks for
            (``"relative"`` if no mode is given). A key value is held until it has changed by more
            than the threshold. Either one number, or one for each layer, which may itself be a
            tuple with one for each of the layer's kv heads. 0 holds nothing that has changed.
        threshold_mode: Where a held value ends. ``"optimal"``, the default unless another value
            given needs ``"relative"``, cuts each channel of
            a block into runs so that what their errors do to the model's output and the number of
            runs together cost least; ``"greedy"`` comes near to that in one pass; see
            :mod:`mlx_delta.method.runs`. ``"relative"``: the threshold of a block and kv head is
            ``threshold`` times the root mean square of the block's keys around their mean.
            ``"absolute"``: ``threshold`` itself, in units of the keys (the paper).
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
        key_bits: Bits of a key far from the query, on average over the model (2 to 8, such as 3.5).
            ``None``: it is held in full (fast without a GPU, saves no memory). Needs ``keyframes``
            and a ``block_size`` that is a multiple of 8, up to 64; near keys, and the first ones,
            stay in 16 bits.
        value_bits: Bits of a value far from the query, likewise (2 to 8). ``None``: values are
            stored in the model's type. 16: in 16 bits.
        level: For the modes ``"optimal"`` and ``"greedy"``: what a run costs; the higher, the
            more is held. 0 holds nothing that has changed. ``None``: a safe default.
        sensitivities: For the same modes: how much the model's output minds errors of each
            layer's, kv head's and channel's keys. A name is that of a file beside the model, which
            :func:`mlx_delta.load` reads. ``None``: :func:`mlx_delta.load` weighs
            channels by the queries of a short sample (unless ``lazy``); all count alike elsewhere.
        prefill: ``"exact"``: a prompt's queries look at all keys. ``"tiles"``: only at blocks of
            keys that are expected to matter to a block of queries (:mod:`mlx_delta.method.tiles`);
            faster on long prompts, and not exact.
        tiles: For ``prefill="tiles"``: the share of the expected attention that is computed; one
            number, or one for each layer (``python -m mlx_delta.calibrate --tiles``).
        key_format: How keys of ``key_bits`` are stored. ``"deltas"``, what they are unless another
            is given: held, with a threshold_mode that cuts runs, and their values codes, with more
            bits (2 to 7) in channels that the sensitivities say matter
            (:mod:`mlx_delta.method.deltas`). ``"codes"``: nothing is held; every far key is a code
            (:mod:`mlx_delta.method.codes`), with more bits likewise; without calibrated
            sensitivities keys are rotated, and get equal codes. ``"held"``: without ``key_bits``.
        value_format: Follows from ``value_bits`` and need not be given. ``"plain"``: as they are.
            ``"rotated"``: values far from the query are rotated and stored as codes, with more bits
            in kv heads that matter; near ones are stored in 16 bits. Needs ``key_bits``.
        key_widths: The width of each channel's codes, chosen by :meth:`with_widths`: for each layer
            a string of digits for each kv head, or ``None`` where all channels count alike.
        value_widths: The width of each kv head's values: for each layer a tuple, or ``None``.
        max_size: Tokens that a cache keeps at most. ``None``: all. Beyond it the oldest blocks go,
            but for the first, which holds the sinks; an eighth of what is kept at a time.

    Raises:
        ValueError: A value is out of range; the message names it.
    """

    threshold: Thresholds | None = None
    threshold_mode: ThresholdMode | None = None
    block_size: int = 64
    window: int = 64
    sinks: int = 4
    keyframes: bool = True
    run_value: RunValue = "mean"
    block_fraction: float | None = None
    key_bits: float | None = None
    value_bits: float | None = None
    level: float | None = None
    sensitivities: Sensitivities | str | None = None
    prefill: Prefill = "exact"
    tiles: float | tuple[float, ...] = 0.95
    max_size: int | None = None
    key_format: KeyFormat = "held"
    value_format: ValueFormat = "plain"
    key_widths: KeyWidths | None = None
    value_widths: ValueWidths | None = None

    def __post_init__(self) -> None:
        """Fill in what follows from the rest, and validate every field once."""
        if self.threshold_mode is None:
            given = _needs_threshold(
                self.threshold, self.keyframes, self.run_value, self.block_fraction
            )
            object.__setattr__(self, "threshold_mode", "relative" if given else "optimal")
        if self.threshold is None and self.threshold_mode in ("relative", "absolute"):
            object.__setattr__(self, "threshold", 1.0)
        # JSON gives lists; tuples keep the configuration hashable.
        object.__setattr__(self, "threshold", _nested(self.threshold, tuple))
        for name in ("tiles", "key_widths", "value_widths"):
            object.__setattr__(self, name, _nested(getattr(self, name), tuple))
        given_weights: Any = self.sensitivities
        if isinstance(given_weights, Mapping):
            read = Sensitivities.from_dict(given_weights)
            object.__setattr__(self, "sensitivities", read)
        # What the names of formats say where only bits are given.
        only_bits = self.key_format == "held" and self.key_bits is not None
        if only_bits:
            object.__setattr__(self, "key_format", "deltas" if self.cuts_runs else "codes")
        if self.value_format == "plain" and self.value_bits not in (None, 16):
            object.__setattr__(self, "value_format", "rotated")
        check_setting(self)
        if only_bits and not self.cuts_runs:
            say(
                f"[DeltaConfig] key_bits={self.key_bits} with a threshold: keys are codes "
                "(key_format='codes'), and the threshold holds none."
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
    def cuts_runs(self) -> bool:
        """Whether a level sets how much is held, rather than a threshold."""
        return self.threshold_mode in RUN_MODES

    @property
    def run_level(self) -> float:
        """The level, or the default one."""
        return DEFAULT_LEVEL if self.level is None else self.level

    def changed(self, **fields: Any) -> DeltaConfig:
        """The setting with other values; one for the other kind of mode drops those of this kind.

        So that ``threshold=0.5`` or ``level=0.1`` alone is enough, whatever the setting is now;
        and so is ``tiles=0.95``.

        Raises:
            ValueError: A value is out of range, or of no field.
        """
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ValueError(f"[DeltaConfig] unknown setting {unknown[0]!r}.")
        mode = fields.get("threshold_mode")
        if mode is None:
            mode = self.threshold_mode
            runs = fields.get("level") is not None or fields.get("sensitivities") is not None
            if runs and not self.cuts_runs:
                mode = "optimal"
            elif self.cuts_runs and _needs_threshold(**fields):
                mode = "relative"
        fields["threshold_mode"] = mode
        if fields.get("tiles") is not None:
            fields.setdefault("prefill", "tiles")
        self._keep_formats_and_bits_together(fields)
        if mode in RUN_MODES and not self.cuts_runs:
            fields.setdefault("threshold", None)
        if mode not in RUN_MODES and self.cuts_runs:
            fields.setdefault("level", None)
            fields.setdefault("sensitivities", None)
        return dataclasses.replace(self, **fields)

    def _keep_formats_and_bits_together(self, fields: dict[str, Any]) -> None:
        """Of bits and formats that are changed, the one that was not given follows the other."""
        for kind, full, whole in (("key", "held", (None,)), ("value", "plain", (None, 16))):
            form, bits = f"{kind}_format", f"{kind}_bits"
            if fields.get(form) == full:
                if fields.get(bits) not in whole:
                    raise ValueError(
                        f"[DeltaConfig] {form}={full!r} and {bits}={shown(fields[bits])} "
                        "contradict each other; drop one."
                    )
                if getattr(self, bits) not in whole:
                    fields.setdefault(bits, None)
            elif bits in fields and fields[bits] in whole:
                fields.setdefault(form, full)
        if "key_bits" in fields and fields["key_bits"] is None and self.value_format != "plain":
            # Values are codes where keys are.
            fields.setdefault("value_bits", None)
            if fields["value_bits"] in (None, 16):
                fields.setdefault("value_format", "plain")

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
    def least_size(self) -> int:
        """The smallest ``max_size``: sinks, window, the block being filled, and two more."""
        return (-(-self.sinks // self.block_size) + self.window_blocks + 3) * self.block_size

    @property
    def layer_threshold(self) -> float | tuple[float, ...]:
        """The threshold of a setting of one layer; a tuple if its kv heads have their own."""
        if not isinstance(self.threshold, tuple):
            return 0.0 if self.threshold is None else self.threshold
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
        """The setting of one layer, with that layer's own threshold and share of tiles.

        Thresholds of its heads stay in a tuple of one layer, ``((0.9, 1.1),)``, so that they are
        never taken for thresholds of layers; and so do widths of its codes.

        Raises:
            ValueError: There are thresholds or shares for another number of layers.
        """
        own: dict[str, Any] = {}
        if self.sensitivities is not None:
            found = self.loaded_sensitivities.for_layer(layer, n_layers)
            # Without any of this layer, codes are rotated.
            known = found.layers[0] is not None or self.key_format != "codes"
            own["sensitivities"] = found if known else None
        config = self.with_widths()
        for name in ("threshold", "tiles", "key_widths", "value_widths"):
            values = getattr(config, name)
            if isinstance(values, tuple):
                if len(values) != n_layers:
                    raise ValueError(
                        f"[DeltaConfig] {name} has {len(values)} values but the model has "
                        f"{n_layers} layers."
                    )
                value = values[layer]
                own[name] = (value,) if isinstance(value, tuple) else value
        return dataclasses.replace(self, **own) if own else self

    def with_widths(self) -> DeltaConfig:
        """The setting with the widths of codes of all layers, by its sensitivities if they say any.

        Over the whole model: so this is to be asked before it is cut into layers or heads.
        """
        found, chosen = self.sensitivities, self
        if not isinstance(found, Sensitivities):
            return self
        choices = {"codes": choose_key_widths, "deltas": choose_lane_widths}
        choose = choices.get(self.key_format)
        if choose is not None and self.key_widths is None and self.key_bits is not None:
            widths = choose(found, self.key_bits)
            chosen = dataclasses.replace(chosen, key_widths=widths)
        rotated = self.value_format == "rotated" and self.value_widths is None
        if rotated and self.value_bits is not None:
            of_values = choose_value_widths(found, self.value_bits)
            chosen = dataclasses.replace(chosen, value_widths=of_values)
        return chosen

    @property
    def tile_share(self) -> float:
        """The share of tiles of a setting of one layer."""
        if isinstance(self.tiles, tuple):
            raise ValueError("[DeltaConfig] tiles per layer: call for_layer first.")
        return self.tiles

    @property
    def loaded_sensitivities(self) -> Sensitivities:
        """The sensitivities themselves.

        Raises:
            ValueError: There is only the name of their file.
        """
        if not isinstance(self.sensitivities, Sensitivities):
            raise ValueError(
                f"[DeltaConfig] the sensitivities {self.sensitivities!r} are not loaded; load the "
                "model with mlx_delta.load, or give them as Sensitivities."
            )
        return self.sensitivities

    def sensitivities_of_layer(self, n_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a setting of one layer: its weights and its salience, each float32 [Hkv, D].

        Raises:
            ValueError: The sensitivities are of a layer of another shape, or not loaded.
        """
        if self.sensitivities is None:
            # As if queries had a mean square of 1, and their scores were divided by sqrt(D).
            weights = np.full((n_heads, head_dim), 1 / head_dim, np.float32)
            return weights, np.zeros_like(weights)
        return self.loaded_sensitivities.of_layer(n_heads, head_dim)

    def for_head(self, head: int) -> DeltaConfig:
        """The setting of one kv head; of a setting of one layer."""
        if self.cuts_runs:
            if self.sensitivities is None:
                return self
            return dataclasses.replace(self, sensitivities=self.loaded_sensitivities.for_head(head))
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
        if isinstance(self.sensitivities, Sensitivities):
            self.sensitivities.check_heads(n_heads)
        own = self.layer_threshold
        if isinstance(own, tuple) and len(own) != n_heads:
            name = "a layer" if layer is None else f"layer {layer}"
            raise ValueError(
                f"[DeltaConfig] threshold has {len(own)} values for the heads of {name} but it "
                f"has {n_heads} kv heads."
            )

    def to_dict(self, whole: bool = False) -> dict[str, Any]:
        """The setting as plain JSON values, as stored under ``delta`` in a config.json.

        Args:
            whole: Whether sensitivities that come from a file are written out too, rather than
                the file's name.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("threshold", "tiles", "key_widths", "value_widths"):
            values[name] = _nested(getattr(self, name), list)
        if isinstance(self.sensitivities, Sensitivities):
            named = None if whole else self.sensitivities.file
            values["sensitivities"] = named or self.sensitivities.to_dict()
        optional = ["block_fraction", "key_bits", "value_bits", "threshold", "level"]
        optional += ["sensitivities", "max_size", "key_widths", "value_widths"]
        # As written by versions that knew no other.
        if self.prefill == "exact":
            del values["prefill"], values["tiles"]
        for name, only in (("key_format", "held"), ("value_format", "plain")):
            if values[name] == only:
                del values[name]
        return {k: v for k, v in values.items() if k not in optional or v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeltaConfig:
        """The setting written by :meth:`to_dict`; keys left out take their defaults.

        Forms that earlier versions wrote, and that are gone, become the nearest one there is, with
        a warning (:mod:`mlx_delta.old_settings`).

        Raises:
            ValueError: They are no mapping, an unknown key, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"[DeltaConfig] the settings must be an object but got {shown(values)}."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - names))
        if unknown:
            raise ValueError(
                f"[DeltaConfig] unknown setting {shown(unknown[0])}; known are "
                f"{', '.join(sorted(names))}."
            )
        return cls(**modern_fields(values, _cuts_runs(values)))

    @classmethod
    def parse(cls, text: str, base: DeltaConfig | None = None) -> DeltaConfig:
        """The setting that ``key_bits=4,level=0.1`` stands for, as on the command lines.

        Any field may be given; thresholds of layers are joined by slashes and those of a layer's
        heads by colons: ``threshold=0.9:1.1/1.0:1.2``. Of a single one the joint stands alone:
        ``0.9/``. ``str()`` of a setting is written alike.

        Args:
            text: Fields and values; empty changes nothing.
            base: What the other fields are; the default setting if not given.

        Raises:
            ValueError: A field is unknown, with the nearest ones; or a value is wrong.
        """
        return (base or cls()).changed(**read_fields(text, cls))

    def __str__(self) -> str:
        """What :meth:`parse` reads: the fields that differ from the default setting."""
        default = DeltaConfig()
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {k: v for k, v in values.items() if v != getattr(default, k)}
        values.pop("value_format", None)  # it follows from the bits
        if isinstance(self.sensitivities, Sensitivities):
            values["sensitivities"] = self.sensitivities.file or self.sensitivities
            return write_fields(values)
        # A threshold mostly says the mode as well.
        short = write_fields({k: v for k, v in values.items() if k != "threshold_mode"})
        return short if DeltaConfig.parse(short) == self else write_fields(values)


def _needs_threshold(
    threshold: Any = None,
    keyframes: Any = True,
    run_value: Any = "mean",
    block_fraction: Any = None,
    **_: Any,
) -> bool:
    """Whether these values of fields go with the modes that have a threshold."""
    return (
        threshold is not None
        or keyframes is False
        or run_value == "first"
        or block_fraction is not None
    )


def _cuts_runs(values: Mapping[str, Any]) -> bool:
    """Whether the mode of these fields' setting is one that cuts runs."""
    mode = values.get("threshold_mode")
    return mode in RUN_MODES if isinstance(mode, str) else not _needs_threshold(**values)


def _nested(value: Any, kind: type) -> Any:
    """Lists and tuples within each other as lists or tuples throughout."""
    return kind(_nested(x, kind) for x in value) if isinstance(value, (list, tuple)) else value
