"""What was measured of decode attention on this machine, and what follows from it.

``python -m mlx_delta.benchmark --tune`` writes a table for each device and release of MLX into the
user's folder for caches; attention looks up which path was fastest for a shape, and ``generate``
whether coded keys were as fast as dense attention. Without a table, or with one that is damaged or
of something else, nothing is known and the built-in choice stands.

``MLX_DELTA_TUNING=off`` lets no table count.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_delta.config import DeltaConfig

from .chips import chip_name, gpu_cores
from .files import write_whole
from .folders import cache_folder

FORMAT = 1
DENSE = "dense"  # MLX's own attention over keys and values in full: what paths are compared with
UNPACK = "unpack"  # all far keys and values written out for each token, and the same attention
KERNEL = "kernel"  # straight from what is stored
# The kernel with so many times as many simdgroups at work as it would choose.
SPLITS = {KERNEL: 1.0, "kernel, half the splits": 0.5, "kernel, twice the splits": 2.0}
PATHS = (*SPLITS, UNPACK)
# As fast as dense: what two runs of the same thing differ by.
NOISE = 1.02

_LARGEST = 1 << 20  # bytes of a file that is read
_LONGEST = 1e9  # seconds that may have been measured


@dataclass(frozen=True)
class Shape:
    """What decides how fast a path is, besides the length.

    Attributes:
        store: How keys and values are stored, as :func:`store_name` says.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key.
    """

    store: str
    heads: int
    kv_heads: int
    head_dim: int


def store_name(config: DeltaConfig) -> str:
    """A setting's way to store keys and values: ``codes 4, rotated 4``; empty in full."""
    if config.key_bits is None:
        return ""
    values = "full" if config.value_bits is None else f"{config.value_bits:g}"
    return f"{config.key_format} {config.key_bits:g}, {config.value_format} {values}"


@dataclass
class Tuning:
    """Seconds of decode attention of one layer and token, on one device.

    Attributes:
        seconds: For each shape and length in tokens, those of each path and of ``dense``.
    """

    seconds: dict[Shape, dict[int, dict[str, float]]] = field(default_factory=dict)

    def best(self, shape: Shape, tokens: int) -> str | None:
        """The fastest path at the nearest length that was measured; ``None``: not known."""
        lengths = self.seconds.get(shape)
        if not lengths:
            return None
        near = min(lengths, key=lambda n: abs(math.log(n / max(1, tokens))))
        paths = {name: t for name, t in lengths[near].items() if name in PATHS}
        return min(paths, key=lambda name: paths[name], default=None)

    def times_dense(self, shape: Shape) -> float | None:
        """The most that the fastest path takes of dense attention's time, over all lengths."""
        ratios = [
            min(times[name] for name in PATHS if name in times) / times[DENSE]
            for times in self.seconds.get(shape, {}).values()
            if DENSE in times and any(name in times for name in PATHS)
        ]
        return max(ratios, default=None)

    def merged(self, newer: Tuning) -> Tuning:
        """Both; where both know a shape's length, the newer one's."""
        shapes = {**self.seconds, **newer.seconds}
        return Tuning(
            {
                shape: {**self.seconds.get(shape, {}), **newer.seconds.get(shape, {})}
                for shape in shapes
            }
        )

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "format": FORMAT,
            "device": device_name(),
            "mlx": mlx_version(),
            "seconds_of_a_layer_and_token": [
                {**vars(shape), "lengths": {str(n): times for n, times in lengths.items()}}
                for shape, lengths in self.seconds.items()
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Tuning:
        """The table of a file's content.

        Raises:
            ValueError: It is no such table, or of another device or release.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError("it is no table of this format")
        for name, own in (("device", device_name()), ("mlx", mlx_version())):
            if data.get(name) != own:
                raise ValueError(f"its {name} is {str(data.get(name))[:60]!r}, not {own!r}")
        table = cls()
        try:
            for entry in data["seconds_of_a_layer_and_token"]:
                numbers = [entry[name] for name in ("heads", "kv_heads", "head_dim")]
                if not all(type(n) is int and n > 0 for n in numbers):
                    raise ValueError("a shape is no shape")
                shape = Shape(str(entry["store"]), *numbers)
                table.seconds[shape] = {
                    _length(n): {str(name): _seconds(t) for name, t in times.items()}
                    for n, times in entry["lengths"].items()
                }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks something ({error})") from error
        return table


def _length(text: Any) -> int:
    if not isinstance(text, str) or not text.isdecimal() or not 0 < len(text) < 10 or not int(text):
        raise ValueError(f"{text!r:.20} is no length")
    return int(text)


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < _LONGEST:
        raise ValueError(f"{value!r:.20} is no time")
    return float(value)


@cache
def device_name() -> str:
    """What a table is of: the GPU by the name that MLX knows, and its cores."""
    name = str(mx.device_info().get("device_name") or chip_name())
    cores = gpu_cores()
    return f"{name}, {cores} GPU cores" if cores else name


@cache
def mlx_version() -> str:
    """The release of MLX whose kernels were measured."""
    return importlib.metadata.version("mlx")


def table_file() -> Path:
    """Where this device's table lies, for this release of MLX."""
    plain = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return cache_folder() / "tuning" / f"{plain}-mlx-{mlx_version()}.json"


def tables_count() -> bool:
    """Whether tables may decide anything."""
    return os.environ.get("MLX_DELTA_TUNING", "").lower() != "off"


@cache
def read_tuning() -> Tuning:
    """This machine's table, read once; an empty one where there is none that can be used."""
    if not tables_count():
        return Tuning()
    try:
        return _read(file := table_file())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"[tuning] {file} is not used: {reason[:200]}. `python -m mlx_delta.benchmark --tune` "
            "writes it anew.",
            stacklevel=2,
        )
        return Tuning()


def _read(file: Path) -> Tuning:
    """A file's table; an empty one where there is no file.

    Raises:
        ValueError: It is none that can be used.
        OSError: It can't be read.
    """
    if not file.exists():
        return Tuning()
    if not file.is_file():
        raise ValueError("it is no file")
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    return Tuning.from_json(json.loads(file.read_text(encoding="utf-8")))


def check_place() -> None:
    """Refuse a place where no table can be written, before anything is measured.

    Raises:
        OSError: It is one.
    """
    file = table_file()
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, where the table is to be; remove it.")
    existing = next(parent for parent in file.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"the table is to be {file}, but can't be written in {existing}; name another folder "
            "with MLX_DELTA_CACHE."
        )


def with_known(table: Tuning) -> Tuning:
    """A table with what this machine's file knows besides, whether tables count or not."""
    try:
        known = _read(table_file())
    except (OSError, ValueError, RecursionError):
        return table  # a damaged one is about to be replaced
    return known.merged(table)


def write_tuning(table: Tuning) -> Path:
    """Put a table in its place, over what is known of other shapes and lengths; returns the file.

    Raises:
        OSError: It can't be written; an older one stays as it was.
    """
    file = table_file()
    text = json.dumps(with_known(table).to_json(), indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{text}\n".encode())
    read_tuning.cache_clear()
    _best.cache_clear()
    return file


# The path that measurements ask for, whatever a table says.
_asked: ContextVar[str | None] = ContextVar("asked", default=None)


@contextmanager
def by_path(path: str) -> Iterator[None]:
    """Let decode attention take a path, for as long as this lasts."""
    token = _asked.set(path)
    try:
        yield
    finally:
        _asked.reset(token)


def decode_path(shape: Shape, tokens: int) -> str | None:
    """The path to take for one query of a text of so many tokens; ``None``: not known."""
    asked = _asked.get()
    # Lengths by their power of two: a text that grows asks the table a few times in all.
    return asked if asked is not None else _best(shape, tokens.bit_length())


@lru_cache(maxsize=256)
def _best(shape: Shape, bits: int) -> str | None:
    return read_tuning().best(shape, 3 << bits >> 2)
