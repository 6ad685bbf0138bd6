"""Presets for Macs, iPads and iPhones, and whether a model fits into a device's memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .architecture import Architecture
from .errors import ConvertError
from .files import format_bytes

GB = 10**9
# Buffers of a forward pass, the tokenizer and the app around it.
OVERHEAD_BYTES = int(0.3 * GB)


@dataclass(frozen=True)
class Target:
    """Defaults of a kind of device; every one has its own option.

    Attributes:
        bits: For the layers' projections.
        group_size: Weights that share a scale.
        embed_bits: For the embedding and the head. The head is read whole at every token, so it
            decides the speed of small models.
        context: Tokens to plan memory for, at most what the model was trained for.
        kv_bits: Of the key-value cache: 16 for Macs; with 8, Swift's quantized cache.
        memory: The device's memory that is assumed, in GB.
    """

    bits: int
    group_size: int
    embed_bits: int
    context: int
    kv_bits: int
    memory: float


TARGETS = {
    "mac": Target(bits=4, group_size=64, embed_bits=6, context=32768, kv_bits=16, memory=16),
    "ipad": Target(bits=4, group_size=64, embed_bits=4, context=8192, kv_bits=8, memory=8),
    "iphone": Target(bits=4, group_size=64, embed_bits=4, context=4096, kv_bits=8, memory=6),
}

# What an app can use on iPads and iPhones, in GB: (always reported, reported at best, with the
# increased-memory entitlement), by the device's memory. Reports of developers, not promises.
APP_MEMORY = {4: (2.1, 2.4), 6: (3.1, 4.2), 8: (3.0, 6.0), 12: (6.0, 8.0), 16: (12.0, 12.0)}


def parse_memory(text: str) -> float:
    """A device's memory in GB from ``8GB``, ``8 gb``, ``8192MB`` or ``8``.

    Raises:
        ConvertError: It is none of these, or no memory that a model could run in.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([mgt]?)(?:i?b)?\s*", text.lower())
    # Memory is sold in powers of two and named in decimal words: 8192 MB are 8 GB.
    size = float(match[1]) * {"m": 1 / 1024, "t": 1024}.get(match[2], 1) if match else 0.0
    if not 0.5 <= size <= 4096:
        raise ConvertError(
            f"--device-memory must look like 8GB and be from 512MB to 4096GB but is {text[:40]!r}."
        )
    return size


def usable_memory(target: str, memory: float) -> tuple[int, int]:
    """Bytes that a model can count on, and the most that was seen, on a device.

    Macs: the GPU may use two thirds of up to 36 GB, three quarters of more (Metal's
    recommendedMaxWorkingSetSize as seen on Apple silicon).
    """
    if target == "mac":
        usable = int(memory * GB * (0.75 if memory > 36 else 2 / 3))
        return usable, usable
    sizes = [size for size in APP_MEMORY if size <= memory]
    if not sizes:
        return int(memory * GB * 0.5), int(memory * GB * 0.6)
    low, high = APP_MEMORY[max(sizes)]
    return int(low * GB), int(high * GB)


@dataclass(frozen=True)
class Fit:
    """Whether weights and cache fit.

    Attributes:
        verdict: ``yes``, ``tight`` (only where an app gets the most that was seen) or ``no``.
        text: One or more lines for people.
    """

    verdict: str
    text: str
    needed: int
    usable: int


def assess(
    arch: Architecture, weight_bytes: int, target: str, memory: float, context: int, kv_bits: int
) -> Fit:
    """Compare what a model needs with what a device gives, and say what would fit.

    Args:
        arch: The model's shape.
        weight_bytes: Bytes of the converted weights.
        target: ``mac``, ``ipad`` or ``iphone``.
        memory: The device's memory in GB.
        context: Tokens in the cache.
        kv_bits: 4, 8 or 16.
    """
    cache = arch.kv_bytes(context, kv_bits)
    needed = weight_bytes + cache + OVERHEAD_BYTES
    low, high = usable_memory(target, memory)
    verdict = "yes" if needed <= low else "tight" if needed <= high else "no"
    gives = format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
    lines = [
        f"needs {format_bytes(needed)}: weights {format_bytes(weight_bytes)}, {kv_bits}-bit cache "
        f"of {context} token{'s' * (context != 1)} {format_bytes(cache)}, overhead "
        f"{format_bytes(OVERHEAD_BYTES)}",
        f"{target} with {memory:g} GB gives a model about {gives}: "
        + {
            "yes": "it fits",
            "tight": "tight; it may fit with the increased-memory entitlement",
            "no": "it does not fit",
        }[verdict],
    ]
    if verdict != "yes":
        lines += [f"would fit: {way}" for way in _ways(arch, weight_bytes, low, kv_bits)]
    return Fit(verdict, "\n".join(lines), needed, low)


def _ways(arch: Architecture, weight_bytes: int, usable: int, kv_bits: int) -> list[str]:
    """What would make a model fit."""
    ways = []
    left = usable - weight_bytes - OVERHEAD_BYTES
    for bits in sorted({kv_bits, 8, 4}, reverse=True):
        if bits <= kv_bits and left > 0:
            context = int(left / arch.kv_bytes(1024, bits) * 1024) // 256 * 256
            if context >= 512:
                ways.append(f"--max-context {min(context, arch.positions)} --kv-bits {bits}")
    if not ways and usable <= OVERHEAD_BYTES:
        ways.append("nothing: a model needs more memory than this for its overhead alone")
    elif not ways:
        ways.append(
            f"weights of at most {format_bytes(max(0, usable - OVERHEAD_BYTES))} less the cache: "
            "fewer bits (--q-bits, --embed-bits), a smaller model or more memory"
        )
    return ways
