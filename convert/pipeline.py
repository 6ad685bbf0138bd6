"""Writing the weights: a few rows in memory at a time, shard by shard, resumable.

Everything goes to a directory beside the output. A shard that is complete is entered in a
manifest with its checksum; a second run with the same plan keeps it. The output appears at the
end, by renaming, so that it is either whole or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.ternary.codes import pack_rows, pack_words

from .errors import ConvertError
from .files import dump_json, format_bytes, read_json, sha256, write_file
from .from_safetensors import MLX_DTYPES, to_mlx
from .plan import Item, Plan
from .progress import Progress
from .safetensors_io import Writer
from .weights import (
    Affine,
    Source,
    Ternary,
    check_finite,
    dequantize_affine,
    dequantize_ternary,
)

MANIFEST = "manifest.json"
LOCK = "lock"
# Weights held at once: 8 MB in bfloat16, 16 MB in float32, a few times that while they change.
STEP_ELEMENTS = 4 << 20
# Errors are measured on one row of so many: reading a quantized row back costs twice as much as
# quantizing it. `--verify` compares everything.
SAMPLED = 16


@dataclass
class Error:
    """Accumulates the difference between a tensor and its source."""

    name: str
    dtype: str
    squares: float = 0.0
    reference: float = 0.0
    largest: float = 0.0

    def add(self, new: mx.array, old: mx.array) -> None:
        """Count rows of float32 values.

        Raises:
            ConvertError: The new ones are not finite.
        """
        # Scaled first: float32 can't hold the squares of large weights.
        scale = mx.maximum(mx.max(mx.abs(old)), 1e-30)
        difference = (new - old) / scale
        parts = [mx.sum(mx.square(difference)), mx.sum(mx.square(old / scale)), scale]
        largest = float(mx.max(mx.abs(difference)))
        squares, reference, unit = (float(part) for part in parts)
        if not math.isfinite(squares):
            raise out_of_range(self.name, self.dtype)
        self.squares += squares * unit**2
        self.reference += reference * unit**2
        self.largest = max(self.largest, largest * unit)

    def summary(self) -> dict[str, float]:
        """Relative root mean square and largest absolute difference."""
        relative = math.sqrt(self.squares / self.reference) if self.reference else 0.0
        return {"relative_rms": float(f"{relative:.6g}"), "largest": float(f"{self.largest:.6g}")}


def out_of_range(name: str, dtype: str) -> ConvertError:
    """The error for values that are too large."""
    return ConvertError(
        f"tensor {name} has values that {dtype} can't hold; use --dtype bfloat16 or float32."
    )


def to_numpy(array: mx.array) -> np.ndarray:
    """An array in the dtype of ``safetensors_io.NUMPY``."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


class Work:
    """The directory beside the output where a conversion grows.

    Raises:
        ConvertError: Something else has that name, or another process is at it.
    """

    def __init__(self, output: Path, fingerprint: str):
        self.folder = output.with_name(output.name + ".partial")
        manifest = self.folder / MANIFEST
        if self.folder.is_symlink() or (self.folder.exists() and not manifest.is_file()):
            if self.folder.is_symlink() or not self._empty():
                raise ConvertError(f"{self.folder} is in the way; remove it or choose another -o.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConvertError(f"another process is converting into {self.folder}.") from None
        self.shards: dict[str, dict[str, Any]] = {}
        self.resumed = self.restarted = False
        if manifest.is_file():
            self._read(manifest, fingerprint)
        self.fingerprint = fingerprint
        self.save()

    def _empty(self) -> bool:
        return self.folder.is_dir() and {p.name for p in self.folder.iterdir()} <= {LOCK}

    def _read(self, manifest: Path, fingerprint: str) -> None:
        """Take over what an earlier run finished, if it had the same plan."""
        try:
            values = read_json(manifest)
            same, shards = values["fingerprint"] == fingerprint, values["shards"]
        except (ConvertError, KeyError):
            same, shards = False, {}
        if same:
            for name, entry in shards.items():
                file = self.folder / name
                # The checksum too: after a power failure a file's size says little.
                if file.is_file() and sha256(file) == entry["sha256"]:
                    self.shards[name] = entry
            self.resumed = bool(self.shards)
        else:
            self.restarted = True
        for file in self.folder.iterdir():
            if file.name not in {LOCK, MANIFEST, *self.shards}:
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()

    def save(self) -> None:
        """Write the manifest."""
        values = {"fingerprint": self.fingerprint, "shards": self.shards}
        write_file(self.folder / MANIFEST, dump_json(values))

    def release(self) -> None:
        """Let another process have the directory."""
        self._lock.close()

    def finish(self, output: Path, overwrite: bool) -> None:
        """Turn the directory into the output."""
        (self.folder / MANIFEST).unlink()
        (self.folder / LOCK).unlink()
        old = output.with_name(output.name + ".replaced")
        if overwrite and output.exists():
            os.rename(output, old)
        os.rename(self.folder, output)
        if old.exists():
            shutil.rmtree(old)
        folder = os.open(output.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.release()


def fingerprint(source: Source, plan: Plan, settings: dict[str, Any]) -> str:
    """A digest of everything that decides the output's bytes."""
    values: dict[str, Any] = {"settings": settings, "mlx": version("mlx"), "inputs": []}
    for path in source.inputs:
        status = path.stat()
        values["inputs"].append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    values["files"] = {
        name: hashlib.sha256(data).hexdigest() for name, data in sorted(source.files.items())
    }
    values["plan"] = [
        [plan.shard_name(i), [[spec.name, spec.dtype, spec.shape] for spec in item.outputs]]
        for i, shard in enumerate(plan.shards)
        for item in shard
    ]
    return hashlib.sha256(dump_json(values)).hexdigest()


def check_space(folder: Path, plan: Plan) -> None:
    """Compare the free space with what the output takes.

    Raises:
        ConvertError: It is too little.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < plan.nbytes + (64 << 20):
        raise ConvertError(
            f"{folder} has {format_bytes(free)} free but the output takes "
            f"{format_bytes(plan.nbytes)}; choose another -o."
        )


def write_shards(plan: Plan, work: Work, progress: Progress) -> dict[str, dict[str, Any]]:
    """Write all shards that are not there yet.

    Returns:
        For each shard its bytes, SHA-256 and tensors, as the report has them.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: list[tuple[str, list[dict[str, Any]], Future[str]]] = []

        def enter(name: str, tensors: list[dict[str, Any]], digest: Future[str]) -> None:
            size = (work.folder / name).stat().st_size
            work.shards[name] = {"bytes": size, "sha256": digest.result(), "tensors": tensors}
            work.save()

        for i, shard in enumerate(plan.shards):
            name = plan.shard_name(i)
            if name in work.shards:
                progress.add(sum(item.weight.source_bytes for item in shard), skipped=True)
                continue
            writer = Writer(work.folder / name, (s for item in shard for s in item.outputs))
            try:
                tensors = [_write_item(item, writer, progress) for item in shard]
                writer.close()
            except BaseException:
                writer.abort()
                raise
            # The checksum of one shard is computed while the next one is converted.
            pending.append((name, tensors, pool.submit(sha256, work.folder / name)))
            while pending and (pending[0][2].done() or len(pending) > 1):
                enter(*pending.pop(0))
        for entry in pending:
            enter(*entry)
    return {name: work.shards[name] for name in map(plan.shard_name, range(len(plan.shards)))}


def _write_item(item: Item, writer: Writer, progress: Progress) -> dict[str, Any]:
    """Convert one tensor, some rows at a time; its entry in the report."""
    weight = item.weight
    error = Error(weight.name, item.outputs[-1].dtype)
    scale = 0.0
    for start, stop in _steps(item):
        if item.action == "pack u8":
            codes, scale = _packed_rows(item, start, stop, scale)
            writer.write(item.outputs[0].name, start, codes)
        else:
            for spec, data in zip(item.outputs, _rows(item, start, stop, error), strict=True):
                writer.write(spec.name, start, data)
        progress.add(weight.source_bytes * (stop - start) // item.outputs[0].shape[0])
    if item.action == "pack u8":
        data = _packed_scale(item, scale)
        writer.write(item.outputs[1].name, 0, data)
        # The codes are exact: all that can be lost is the scale's rounding.
        rounded = to_mlx(data, item.outputs[1].dtype).astype(mx.float32)
        error.add(rounded, mx.array([scale]))
    return {
        "name": weight.name,
        "shape": list(weight.shape),
        "source_type": weight.source_type,
        "target_type": item.target_type,
        "source_bytes": weight.source_bytes,
        "bytes": item.nbytes,
        "error": error.summary(),
    }


def _steps(item: Item) -> Iterator[tuple[int, int]]:
    """Ranges of rows (of packed rows, for BitNet's packing) to convert at once."""
    shape, multiple = item.weight.shape, item.weight.row_multiple
    rows = shape[0]
    width = shape[1] if len(shape) > 1 else 1
    if item.action == "pack u8":
        rows, width, multiple = rows // 4, width * 4, 1
    step = max(multiple, STEP_ELEMENTS // width // multiple * multiple)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _rows(item: Item, start: int, stop: int, error: Error) -> list[np.ndarray]:
    """Rows start..stop of an item's outputs."""
    weight, dtype = item.weight, item.outputs[-1].dtype
    rows = weight.read(start, stop)
    sample = slice(0, max(1, (stop - start) // SAMPLED))
    if item.action == "cast":
        old = rows if isinstance(rows, mx.array) else weight.dequantized(start, stop)
        new = old.astype(MLX_DTYPES[dtype])
        if new.dtype != old.dtype:
            error.add(new.astype(mx.float32), old.astype(mx.float32))
        arrays = [new]
    elif item.action == "quantize":
        old = rows if isinstance(rows, mx.array) else weight.dequantized(start, stop)
        # As mlx_lm.convert: cast first, so that codes and scales belong together.
        arrays = list(mx.quantize(old.astype(MLX_DTYPES[dtype]), item.group_size, item.bits))
        mx.eval(arrays)
        part = Affine(*(array[sample] for array in arrays))
        new = dequantize_affine(part, item.group_size, item.bits)
        error.add(new, old[sample].astype(mx.float32))
    elif isinstance(rows, Affine):
        arrays = [
            rows.codes,
            rows.scales.astype(MLX_DTYPES[dtype]),
            rows.biases.astype(MLX_DTYPES[dtype]),
        ]
        if rows.scales.dtype != MLX_DTYPES[dtype]:
            new = dequantize_affine(Affine(*arrays), item.group_size, item.bits)
            error.add(new[sample], dequantize_affine(rows, item.group_size, item.bits)[sample])
    else:
        assert isinstance(rows, Ternary)
        arrays = _ternary_affine(item, rows, error, sample, MLX_DTYPES[dtype])
    outputs = [to_numpy(array) for array in arrays]
    for output, spec in zip(outputs, item.outputs, strict=True):
        _check_range(output, spec.dtype, weight.name)
    return outputs


def _ternary_affine(
    item: Item, rows: Ternary, error: Error, sample: slice, dtype: mx.Dtype
) -> list[mx.array]:
    """Ternary rows in MLX's 2-bit quantization: exact where the type holds the scale."""
    groups = item.weight.shape[1] // item.group_size
    if rows.scales.size == 1:
        scales = np.broadcast_to(rows.scales.reshape(1, 1), (len(rows.codes), groups))
    else:
        scales = np.repeat(rows.scales, groups // rows.scales.shape[1], axis=1)
    cast = mx.array(np.ascontiguousarray(scales)).astype(dtype)
    if dtype != mx.float32:
        part = Ternary(rows.codes[sample], scales[sample])
        rounded = Ternary(part.codes, np.array(cast.astype(mx.float32))[sample])
        error.add(dequantize_ternary(rounded), dequantize_ternary(part))
    return [pack_words(mx.array(rows.codes)), cast, -cast]


def _packed_rows(item: Item, start: int, stop: int, scale: float) -> tuple[np.ndarray, float]:
    """Packed rows start..stop, each of four rows of the source, and the scale seen so far.

    A block of zeros has the scale 0 in some formats; every other one must have the same.

    Raises:
        ConvertError: There are several scales; this layout has room for one.
    """
    weight = item.weight
    quarter = weight.shape[0] // 4
    parts = [weight.read(start + k * quarter, stop + k * quarter) for k in range(4)]
    for part in parts:
        for value in np.unique(part.scales[part.scales != 0]):
            if scale not in (0.0, value):
                raise ConvertError(f"{weight.name} has several scales; use --ternary affine.")
            scale = float(value)
        if part.scales.size > 1:
            zeros = np.repeat(part.scales == 0, part.codes.shape[1] // part.scales.shape[1], axis=1)
            part.codes[zeros] = 1
    return np.array(pack_rows(mx.array(np.concatenate([p.codes for p in parts])))), scale


def _packed_scale(item: Item, scale: float) -> np.ndarray:
    """The scale of a layer in BitNet's packing."""
    data = to_numpy(mx.array([scale]).astype(MLX_DTYPES[item.outputs[1].dtype]))
    _check_range(data, item.outputs[1].dtype, item.weight.name)
    return data


def _check_range(data: np.ndarray, dtype: str, name: str) -> None:
    """Refuse values that the output's type can't hold.

    Raises:
        ConvertError: There are some.
    """
    if dtype in MLX_DTYPES:
        try:
            check_finite(data, dtype, name)
        except ConvertError:
            raise out_of_range(name, dtype) from None
