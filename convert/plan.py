"""Deciding what every tensor becomes, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConvertError
from .from_mlx import BITS, GROUP_SIZES
from .safetensors_io import Spec
from .weights import Source, Weight

Action = Literal["cast", "quantize", "keep", "pack affine", "pack u8"]
LAYOUTS = ("auto", "affine", "packed")


@dataclass(frozen=True)
class Options:
    """The choices that decide the weights' bytes.

    Attributes:
        bits: For projections; ``None`` leaves them in floating point.
        group_size: Weights that share a scale.
        embed_bits: For embedding and head; ``None`` leaves them in floating point.
        requantize: Also quantize anew what the source holds in an exact quantized form.
        dtype: Of everything that isn't quantized, and of scales; ``None``: the source's.
        ternary: Layout of ternary layers: ``packed`` (four codes a byte, BitNet models only),
            ``affine`` (MLX's 2-bit quantization) or ``auto``.
        shard_bytes: Weights in one file, at most.
    """

    bits: int | None = 4
    group_size: int = 64
    embed_bits: int | None = 6
    requantize: bool = False
    requantize_embed: bool = False
    dtype: str | None = None
    ternary: str = "auto"
    shard_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConvertError: One is out of range.
        """
        for name, bits in (("--q-bits", self.bits), ("--embed-bits", self.embed_bits)):
            if bits is not None and bits not in BITS:
                raise ConvertError(f"{name} must be one of {BITS} (or 16: none) but is {bits}.")
        if self.group_size not in GROUP_SIZES:
            raise ConvertError(
                f"--q-group-size must be one of {GROUP_SIZES} but is {self.group_size}."
            )
        if self.ternary not in LAYOUTS:
            raise ConvertError(f"--ternary must be one of {LAYOUTS} but is {self.ternary!r}.")
        if self.shard_bytes < 1 << 16:
            raise ConvertError(f"--shard-size must be 64 kB or more but is {self.shard_bytes}.")


@dataclass(frozen=True)
class Item:
    """What one tensor of the source becomes."""

    weight: Weight
    action: Action
    outputs: tuple[Spec, ...]
    bits: int = 0
    group_size: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the output."""
        return sum(spec.nbytes for spec in self.outputs)

    @property
    def target_type(self) -> str:
        """What it becomes, in words."""
        if self.action == "cast":
            return self.outputs[0].dtype
        if self.action == "pack u8":
            return "ternary U8"
        return f"affine {self.bits}-bit, group {self.group_size}"


@dataclass(frozen=True)
class Plan:
    """The whole conversion.

    Attributes:
        dtype: Of everything that isn't quantized, and of scales.
        shards: The items of each weight file.
        quantization: The entry of config.json; ``None`` when nothing is quantized.
        packed: Whether there are ternary layers in BitNet's own packing.
        notes: What a user should know.
    """

    dtype: str
    shards: list[list[Item]]
    quantization: dict[str, Any] | None
    packed: bool
    notes: list[str] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """All items, in order."""
        return [item for shard in self.shards for item in shard]

    @property
    def nbytes(self) -> int:
        """Bytes of the output's weights."""
        return sum(item.nbytes for item in self.items)

    def shard_name(self, index: int) -> str:
        """The file name of a shard, as transformers and mlx-lm name them."""
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"


def make_plan(source: Source, options: Options) -> Plan:
    """Decide every tensor's target and the files they go to.

    Raises:
        ConvertError: The options can't be met.
    """
    dtype = options.dtype or source.dtype
    notes: list[str] = []
    if options.dtype is None and dtype == "F32" and (options.bits or options.embed_bits):
        dtype = "BF16"
        notes.append("float32 weights: what is not quantized becomes bfloat16 (--dtype float32)")
    layout = options.ternary
    if layout == "auto":
        layout = "packed" if source.arch.model_type == "bitnet" else "affine"
    if layout == "packed" and source.arch.model_type != "bitnet":
        raise ConvertError("--ternary packed is for bitnet models; a llama-type one needs affine.")
    items = [
        _item(weight, source, options, dtype, layout, notes) for weight in source.weights.values()
    ]
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > options.shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    packed = any(item.action == "pack u8" for item in items)
    quantization = _quantization(items, options)
    if source.arch.windows and source.arch.tied and quantization is not None:
        # mlx-swift-lm's Gemma copies the embedding to a head, and looks for its bits there.
        entry = quantization.get("model.embed_tokens")
        quantization |= {"lm_head": entry} if entry else {}
    return Plan(dtype, shards, quantization, packed, notes)


def _item(
    weight: Weight, source: Source, options: Options, dtype: str, layout: str, notes: list[str]
) -> Item:
    """The target of one tensor."""
    shape = weight.shape
    embedding = weight.path in ("model.embed_tokens", "lm_head")
    bits = options.embed_bits if embedding else options.bits
    again = options.requantize_embed if embedding else options.requantize
    specs: tuple[Spec, ...]
    if weight.kind == "ternary":
        if layout == "packed" and shape[0] % 4 == 0:
            specs = (
                Spec(weight.name, "U8", (shape[0] // 4, shape[1])),
                Spec(weight.name + "_scale", dtype, (1,)),
            )
            return Item(weight, "pack u8", specs)
        group_size = _group_size(shape[1], 128)
        if group_size:
            specs = affine_specs(weight, 2, group_size, dtype)
            return Item(weight, "pack affine", specs, 2, group_size)
        raise ConvertError(
            f"{weight.name} has {shape[1]} inputs, not a multiple of 32: no ternary layout fits."
        )
    if weight.kind == "affine" and not (again and bits != weight.bits):
        specs = affine_specs(weight, weight.bits, weight.group_size, dtype)
        return Item(weight, "keep", specs, weight.bits, weight.group_size)
    if len(shape) == 2 and bits is not None:
        group_size = _group_size(shape[1], options.group_size)
        if group_size:
            specs = affine_specs(weight, bits, group_size, dtype)
            return Item(weight, "quantize", specs, bits, group_size)
        notes.append(f"{weight.name} stays {dtype}: {shape[1]} inputs are no multiple of 32")
    return Item(weight, "cast", (Spec(weight.name, dtype, shape),))


def _group_size(inputs: int, wanted: int) -> int:
    """The largest possible group size up to the wanted one, or 0."""
    return next((size for size in (128, 64, 32) if size <= wanted and inputs % size == 0), 0)


def affine_specs(weight: Weight, bits: int, group_size: int, dtype: str) -> tuple[Spec, ...]:
    """The three tensors of a quantized layer."""
    rows, inputs = weight.shape
    groups = (rows, inputs // group_size)
    return (
        Spec(weight.name, "U32", (rows, inputs * bits // 32)),
        Spec(weight.path + ".scales", dtype, groups),
        Spec(weight.path + ".biases", dtype, groups),
    )


def _quantization(items: list[Item], options: Options) -> dict[str, Any] | None:
    """config.json's ``quantization``: the commonest setting, and every layer that differs.

    Integers only, and no other keys: mlx-swift-lm reads every other key as a layer
    (BaseConfiguration.QuantizationContainer).
    """
    settings: dict[tuple[int, int], list[str]] = {}
    for item in items:
        if item.bits:
            settings.setdefault((item.group_size, item.bits), []).append(item.weight.path)
    if not settings:
        return None
    common = max(settings, key=lambda setting: len(settings[setting]))
    entry: dict[str, Any] = {"group_size": common[0], "bits": common[1]}
    for (group_size, bits), paths in settings.items():
        if (group_size, bits) != common:
            entry |= {path: {"group_size": group_size, "bits": bits} for path in paths}
    return entry


def plan_table(plan: Plan) -> list[str]:
    """The plan for people: tensors of one kind and shape on one line."""
    lines: dict[tuple[str, ...], list[int]] = {}
    for item in plan.items:
        name = ".".join("*" if part.isdigit() else part for part in item.weight.name.split("."))
        shape = "x".join(map(str, item.weight.shape))
        key = (name, shape, item.weight.source_type, item.target_type)
        totals = lines.setdefault(key, [0, 0, 0])
        totals[0] += 1
        totals[1] += item.weight.source_bytes
        totals[2] += item.nbytes
    header = ("tensor", "n", "shape", "from", "to", "bytes", "becomes")
    rows = [
        (name, str(n), shape, old, new, f"{before:,}", f"{after:,}")
        for (name, shape, old, new), (n, before, after) in lines.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if i in (1, 5, 6) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]


def bits_per_weight(plan: Plan) -> float:
    """Bits of the output for each weight of the model."""
    count = 0
    for item in plan.items:
        product = 1
        for dimension in item.weight.shape:
            product *= dimension
        count += product
    return plan.nbytes * 8 / count
