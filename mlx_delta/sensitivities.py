"""How much a model's output minds errors of its keys, and which keys it looks at.

A weight for each layer, kv head and channel says the first, ``salience`` the second: keys along
it are looked at more (see :mod:`mlx_delta.method.runs`). How far keys lie apart, and what errors of
values cost, decides how many bits each gets as codes (:mod:`mlx_delta.widths`).

:mod:`mlx_delta.calibrate` measures them and writes them beside the model; ``config.json`` names
the file under ``delta``, and :func:`mlx_delta.load` reads it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "delta_sensitivities.safetensors"
MOST_LAYERS = 1 << 14
FORMAT = "mlx_delta sensitivities 3"
# The first had no salience, the second neither spread nor costs of values.
FORMATS = ("mlx_delta sensitivities 1", "mlx_delta sensitivities 2", FORMAT)
KEY_POWER = 0.75  # of weights in what decides widths of keys' codes; see mlx_delta.widths
PARTS = ("layers", "salience", "spread", "value_costs")
# Of models that are known by name; a file beside a model comes first.
BUNDLED = Path(__file__).parent / "bundled" / "sensitivities"


class Sensitivities:
    """Weights of all layers, or of one; hashable, and never changed.

    Args:
        layers: For each layer float32 [Hkv, D], or ``None`` where no keys are held.
        curve: What levels do: rows of (level, share of deltas that are zero outside the window,
            KL divergence from dense attention in nats per token), levels ascending.
        file: Name of the file they come from, beside the model.
        salience: For each layer float32 [Hkv, D], or ``None``, which is all zeros; of no layer if
            not given.
        spread: For each layer float32 [Hkv, D], the root of the mean square by which a key's
            channel deviates from its mean over a block; or ``None`` where that is not known.
        value_costs: For each layer float32 [Hkv], ``u`` of :mod:`mlx_delta.widths`; or ``None``.

    Raises:
        ValueError: A weight is negative or not finite, another number is not finite or of another
            shape, or the curve's levels do not ascend.
    """

    def __init__(
        self,
        layers: Sequence[np.ndarray | None],
        curve: Sequence[Sequence[float]] = (),
        file: str | None = None,
        salience: Sequence[np.ndarray | None] = (),
        spread: Sequence[np.ndarray | None] = (),
        value_costs: Sequence[np.ndarray | None] = (),
    ):
        self.layers = _float_arrays(layers)
        nothing = [None] * len(self.layers)
        self.salience = _float_arrays(salience or nothing)
        self.spread = _float_arrays(spread or nothing)
        self.value_costs = _float_arrays(value_costs or nothing)
        self.curve = tuple((float(level), float(zeros), float(kl)) for level, zeros, kl in curve)
        self.file = file
        for i, weights in enumerate(self.layers):
            if weights is None:
                continue
            if weights.ndim != 2 or not (np.isfinite(weights).all() and (weights >= 0).all()):
                raise ValueError(
                    f"[Sensitivities] weights of layer {i} must be finite numbers >= 0, one for "
                    f"each kv head and channel, but have shape {weights.shape} or other values."
                )
        for name in PARTS[1:]:
            self._check_part(name)
        levels = [row[0] for row in self.curve]
        if any(b <= a for a, b in zip(levels, levels[1:], strict=False)) or min(levels, default=0):
            raise ValueError("[Sensitivities] the curve's levels must ascend from 0.")
        digest = hashlib.sha256()
        for weights in self.layers:
            digest.update(b"-" if weights is None else repr(weights.shape).encode())
            digest.update(b"" if weights is None else weights.tobytes())
        for name in PARTS[1:]:
            arrays = getattr(self, name)
            if any(x is not None for x in arrays):
                for array in arrays:
                    digest.update(b"-" if array is None else array.tobytes())
        self._digest = digest.digest()

    def _check_part(self, name: str) -> None:
        arrays = getattr(self, name)
        if len(arrays) != len(self.layers):
            raise ValueError(
                f"[Sensitivities] {name} is of {len(arrays)} layers but the weights are of "
                f"{len(self.layers)}."
            )
        for i, (weights, found) in enumerate(zip(self.layers, arrays, strict=True)):
            if found is None:
                continue
            shape = None if weights is None else weights.shape
            if name == "value_costs" and shape is not None:
                shape = shape[:1]
            fits = found.shape == shape and np.isfinite(found).all()
            if not fits or (name != "salience" and (found < 0).any()):
                raise ValueError(
                    f"[Sensitivities] {name} of layer {i} must be finite numbers that fit the "
                    f"layer's weights, but has shape {found.shape} or other values."
                )

    def __hash__(self) -> int:
        """Of the weights."""
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        """Whether the weights are the same."""
        return isinstance(other, Sensitivities) and self._digest == other._digest

    def __repr__(self) -> str:
        """Short: there are thousands of weights."""
        return f"Sensitivities({len(self.layers)} layers, {self._digest.hex()[:8]})"

    def for_layer(self, layer: int, n_layers: int) -> Sensitivities:
        """Weights and salience of one layer: the rest is for all layers together.

        Raises:
            ValueError: They are of a model with another number of layers.
        """
        if len(self.layers) != n_layers:
            raise ValueError(
                f"[DeltaConfig] sensitivities are of {len(self.layers)} layers but the model has "
                f"{n_layers}."
            )
        return Sensitivities([self.layers[layer]], salience=[self.salience[layer]])

    def for_head(self, head: int) -> Sensitivities:
        """Those of one head of a single layer."""
        return self.for_heads(slice(head, head + 1))

    def for_part(self, layers: slice) -> Sensitivities:
        """Those of some of the layers."""
        return self._with(lambda arrays: arrays[layers], self.curve)

    def share_of_heads(self, rank: int, size: int) -> Sensitivities:
        """Those of the ``rank``-th of ``size`` equal shares of each layer's kv heads."""
        return self._with(
            lambda arrays: [None if x is None else np.split(x, size)[rank] for x in arrays],
            self.curve,
        )

    def for_heads(self, heads: slice) -> Sensitivities:
        """Those of some heads of each layer."""
        return self._with(
            lambda arrays: [None if x is None else x[heads] for x in arrays], self.curve, self.file
        )

    def with_curve(
        self, curve: Sequence[Sequence[float]], file: str | None = None
    ) -> Sensitivities:
        """The same with another curve, of a file of this name."""
        return self._with(lambda arrays: arrays, curve, file)

    def with_spread(
        self, spread: Sequence[np.ndarray | None], value_costs: Sequence[np.ndarray | None]
    ) -> Sensitivities:
        """The same weights, salience and curve, and what decides how many bits codes get."""
        return Sensitivities(self.layers, self.curve, self.file, self.salience, spread, value_costs)

    def _with(
        self,
        change: Callable[[Any], Sequence[np.ndarray | None]],
        curve: Sequence[Sequence[float]] = (),
        file: str | None = None,
    ) -> Sensitivities:
        """Those whose arrays are what ``change`` makes of the arrays of all layers."""
        layers, *others = (change(getattr(self, name)) for name in PARTS)
        return Sensitivities(layers, curve, file, *others)

    def key_costs(self) -> list[np.ndarray | None]:
        """``u`` of :mod:`mlx_delta.widths` of each layer's channels, [Hkv, D], where known.

        Raises:
            ValueError: They are too large to be compared.
        """
        with np.errstate(over="ignore"):
            found = [
                None
                if weights is None or spread is None
                else weights**KEY_POWER * np.square(spread)
                for weights, spread in zip(self.layers, self.spread, strict=True)
            ]
        for i, costs in enumerate(found):
            if costs is not None and not np.isfinite(costs.sum()):
                raise ValueError(f"[Sensitivities] weights and spread of layer {i} are too large.")
        return found

    def of_layer(self, n_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """The weights of a single layer and its salience, each float32 [Hkv, D].

        Raises:
            ValueError: They are of a layer of another shape.
        """
        weights = self._only()
        if weights.shape != (n_heads, head_dim):
            raise ValueError(
                f"[DeltaConfig] sensitivities are of {weights.shape[0]} kv heads of "
                f"{weights.shape[1]} channels but the layer has {n_heads} of {head_dim}."
            )
        along = self.salience[0]
        return weights, np.zeros_like(weights) if along is None else along

    def check_heads(self, n_heads: int) -> None:
        """Refuse weights of one layer that are of another number of kv heads.

        Raises:
            ValueError: They are.
        """
        found = len(self._only())
        if found != n_heads:
            raise ValueError(
                f"[DeltaConfig] sensitivities are of {found} kv heads but the layer has {n_heads}."
            )

    def _only(self) -> np.ndarray:
        if len(self.layers) != 1:
            raise ValueError("[DeltaConfig] sensitivities of all layers: call for_layer first.")
        (weights,) = self.layers
        if weights is None:
            raise ValueError("[DeltaConfig] the sensitivities leave out a layer that holds keys.")
        return weights

    def level_for(self, zeros: float | None = None, kl: float | None = None) -> float:
        """The level for a wanted share of zeros, or the highest one with at most this divergence.

        Raises:
            ValueError: There is no curve, or the wish lies beyond it.
        """
        if not self.curve:
            raise ValueError(
                "[DeltaConfig] these sensitivities have no curve of levels; run "
                "`python -m mlx_delta.calibrate` on the model."
            )
        levels, shares, divergences = np.array(self.curve).T
        name, wanted, reached = "share of zeros", zeros, shares
        if wanted is None:
            name, wanted, reached = "KL divergence", kl, np.maximum.accumulate(divergences)
        assert wanted is not None
        if not 0 <= wanted <= reached[-1]:
            raise ValueError(
                f"[DeltaConfig] the {name} must be between 0 and {reached[-1]:.4g}, the end of the "
                f"calibrated curve, but got {wanted}."
            )
        above = int(np.searchsorted(reached, wanted))
        if reached[above] == wanted or above == 0:
            return float(levels[above])
        low, high = levels[above - 1], levels[above]
        part = (wanted - reached[above - 1]) / (reached[above] - reached[above - 1])
        if low == 0:  # has no logarithm
            return float(high * part)
        return float(np.exp(np.log(low) + part * (np.log(high) - np.log(low))))

    # As JSON, for saved caches.

    def to_dict(self) -> dict[str, Any]:
        """The weights as plain JSON values."""
        found = {name: getattr(self, name) for name in PARTS}
        return {
            name: _to_json(arrays)
            for name, arrays in found.items()
            if name == "layers" or any(x is not None for x in arrays)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivities:
        """The weights written by :meth:`to_dict`.

        Raises:
            ValueError: They are broken.
        """
        try:
            layers = _from_json(values["layers"])
            others = [_from_json(values.get(name, ())) for name in PARTS[1:]]
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"[DeltaConfig] sensitivities can't be read: {error}.") from error
        return cls(layers, (), None, *others)

    # As a file.

    def save(self, file: Path) -> None:
        """Write them as safetensors; the curve goes into the metadata.

        Raises:
            OSError: They can't be written.
        """
        import mlx.core as mx

        arrays = {
            f"{name}.{i}": mx.array(x)
            for name in PARTS
            for i, x in enumerate(getattr(self, name))
            if x is not None
        }
        metadata = {
            "format": FORMAT,
            "layers": str(len(self.layers)),
            "curve": json.dumps([[float(f"{x:.5g}") for x in row] for row in self.curve]),
        }
        try:
            mx.save_safetensors(str(file), arrays, metadata)
        except RuntimeError as error:  # a full disk, a folder that is gone
            raise OSError(f"[Sensitivities] can't write in {file.parent}: {error}") from error

    @classmethod
    def find(cls, folder: Path, name: str) -> Sensitivities:
        """Read the file of this name beside a model, or the one that comes with this library.

        Raises:
            FileNotFoundError: There is neither.
            ValueError: It is none of sensitivities, or broken.
        """
        if not name or Path(name).name != name:
            raise ValueError(
                f"[load] sensitivities must name a file beside config.json but are {name!r}."
            )
        beside, bundled = folder / name, BUNDLED / name
        return cls.read(bundled if bundled.is_file() and not beside.is_file() else beside)

    @classmethod
    def read(cls, file: Path) -> Sensitivities:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is none of sensitivities, or broken.
        """
        import mlx.core as mx

        if not file.is_file():
            raise FileNotFoundError(
                f"[load] {file} is missing: config.json names it as the sensitivities; fetch it, "
                "or make it anew with `python -m mlx_delta.calibrate`."
            )
        try:
            loaded: Any = mx.load(str(file), return_metadata=True)
            arrays, metadata = loaded
            if metadata.get("format") not in FORMATS:
                raise ValueError(f"its format is {metadata.get('format')!r}")
            count = int(metadata["layers"])
            if not len(arrays) <= len(PARTS) * count <= len(PARTS) * MOST_LAYERS:
                raise ValueError(f"it has {len(arrays)} arrays of {str(count)[:20]} layers")
            parts = [[arrays.get(f"{name}.{i}") for i in range(count)] for name in PARTS]
            layers, *others = (
                [None if x is None else np.array(x.astype(mx.float32)) for x in part]
                for part in parts
            )
            return cls(layers, json.loads(metadata["curve"]), file.name, *others)
        except (RuntimeError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"[load] {file} can't be read as sensitivities: {error}.") from error


def _float_arrays(arrays: Sequence[np.ndarray | None]) -> tuple[np.ndarray | None, ...]:
    """Copies that nobody changes."""
    copies = tuple(None if x is None else np.array(x, np.float32) for x in arrays)
    for copy in copies:
        if copy is not None:
            copy.flags.writeable = False
    return copies


def _to_json(arrays: Sequence[np.ndarray | None]) -> list[Any]:
    return [
        None if x is None else [*x.shape, base64.b64encode(x.tobytes()).decode("ascii")]
        for x in arrays
    ]


def _from_json(entries: Sequence[Any]) -> list[np.ndarray | None]:
    return [
        None
        if entry is None
        else np.frombuffer(base64.b64decode(entry[-1]), np.float32).reshape(entry[:-1])
        for entry in entries
    ]
