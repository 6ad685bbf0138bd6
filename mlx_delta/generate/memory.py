"""Whether a prompt's caches fit: MLX ends the process without a word when memory runs out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Address space that BLAS and threads ask for once work begins; measured at 240 MB on two cores.
_RESERVED = 240 << 20
_QUERIES = 128  # whose scores are in memory at one time, at least


def check_memory(
    name: str, model: nn.Module, tokens: int, options: dict[str, Any], first: bool = False
) -> None:
    """Refuse a text whose caches and scores are surely larger than the memory that is free.

    Args:
        name: Of the caller, for the message.
        model: The model, loaded.
        tokens: Of the text, without the answer.
        options: mlx-lm's.
        first: Whether this process has not computed anything yet.

    Raises:
        MemoryError: They are larger.
    """
    free, limit = free_memory(_RESERVED if first else 0)
    if free < 0:
        raise MemoryError(
            f"[{name}] {limit} leaves no room to generate in; allow the process more memory."
        )
    if options.get("kv_bits") is not None or options.get("max_kv_size") is not None:
        return  # smaller than the estimate
    needed = estimate(model, tokens)
    if needed > free:
        raise MemoryError(
            f"[{name}] the caches of {tokens} tokens take {needed / 1e9:.1f} GB at least but "
            f"{limit} leaves {free / 1e9:.1f} GB; use a shorter prompt, a smaller window or a "
            "smaller model."
        )


def estimate(model: nn.Module, tokens: int) -> int:
    """Bytes that caches and scores of a text take at least; 0 for a model of unknown form."""
    args = getattr(model, "args", None)
    layers, hidden = getattr(args, "num_hidden_layers", 0), getattr(args, "hidden_size", 0)
    heads = getattr(args, "num_attention_heads", 0)
    if not all(isinstance(x, int) and x > 0 for x in (layers, hidden, heads)):
        return 0
    kv_heads = getattr(args, "num_key_value_heads", None) or heads
    head_dim = getattr(args, "head_dim", None) or hidden // heads
    item_size = 4 if mx.default_device() == mx.Device(mx.cpu) else 2
    delta = getattr(args, "delta", None)
    key, value = item_size * head_dim, item_size * head_dim
    window = 0
    if delta is not None and delta.value_bits is not None:
        value = head_dim * delta.value_bits // 8
    if delta is not None and delta.key_bits is not None:
        # What packed blocks take depends on the text; their near keys have a room of their own.
        window, key = 2 * head_dim * (delta.window + 2 * delta.block_size), 0
    sliding = getattr(args, "sliding_window", None)
    if sliding:
        return 0  # some layers keep less: no lower bound
    caches = layers * kv_heads * (tokens * (key + value) + window)
    return caches + 4 * heads * min(tokens, _QUERIES) * tokens


def free_memory(reserved: int = 0) -> tuple[int, str]:
    """Bytes that this process may still take, and what limits them; negative if none.

    Args:
        reserved: Bytes of address space that will be taken anyway.
    """
    bounds = [(sys.maxsize, "nothing")]
    if mx.default_device() != mx.Device(mx.cpu):
        size = int(mx.device_info()["memory_size"])
        bounds.append((size - mx.get_active_memory(), "this machine's memory"))
    address_space = _address_space()
    if address_space is not None:
        bounds.append((address_space - reserved, "the limit on address space (ulimit -v)"))
    for file, limit in (
        ("/sys/fs/cgroup/memory.max", "the container's memory limit"),
        ("/proc/meminfo", "this machine's memory"),
    ):
        found = _read_bytes(Path(file))
        if found is not None:
            bounds.append((found - (_resident() if "cgroup" in file else 0), limit))
    return min(bounds)


def _address_space() -> int | None:
    """What RLIMIT_AS leaves, where it is set and the system says how much is taken."""
    try:
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - taken


def _read_bytes(file: Path) -> int | None:
    """A limit in a file of the kernel's: one number, or MemAvailable and what can be swapped."""
    try:
        text = file.read_text()
        if "MemAvailable" not in text:
            return int(text)
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return 1024 * sum(int(lines[x].split()[0]) for x in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):
        return None


def _resident() -> int:
    """Bytes of this process in memory."""
    try:
        import resource

        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return 0
