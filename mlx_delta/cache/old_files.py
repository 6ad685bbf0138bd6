"""States of caches as earlier versions wrote them, read into forms that there are.

Packed keys become held keys in full, quantized values plain ones. A block of ``size`` held keys of
one kv head [size, D] was packed as

- a **mask**, uint32 [size - 1, ceil(D / 32)]: bit ``d % 32`` of word ``d // 32`` of row ``t - 1``
  says that channel ``d`` changed at token ``t``. Token 0 has no row: all of it is stored.
- a run of words of the **payload**, from its **offset** on: the values of token 0, then those that
  changed, token by token and channel by channel, ``32 // bits`` to a word, lowest bits first. At
  16 bits they are numbers of the storage type, else codes.
- for codes a **grid**, [2, D] of the storage type: a code stands for ``low + code * step``, at most
  the type's largest number. The first tokens' exact keys lie beside the blocks, as **sinks**.

The last keys were full ones, in a buffer of their own from position ``firsts`` on; of the first
``lost`` blocks there are none. Values of 8 or 4 bits were words, scales and biases of
``mx.quantize``.

The buffers of such a state, in order: near keys [B, Hkv, room, D], one or three of values, masks
[B, Hkv, blocks, size - 1, words], payload [B, words], offsets [B, Hkv, blocks], grid
[B, Hkv, blocks, 2, D] or none, sinks [B, Hkv, sinks, D] or none, zeros [B, Hkv, blocks]. Beside
quantized values keys could also be as they are now, in full or as codes of any kind.

Turned values had words, scales and biases of ``mx.quantize``, both of the storage type; they are
coded anew, as ``method/values.py`` says. Held keys by lanes had no sequence beside their blocks:
tokens came as in the text. Everything else of such a state is as it is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_delta.config import DeltaConfig
from mlx_delta.method.values import value_group, value_words
from mlx_delta.old_settings import has_packed_keys, has_quantized_values, say
from mlx_delta.ops.storage import HEAD_DIMS, LARGEST
from mlx_delta.ops.turned import encode_turned

from .dropping import stored
from .far_keys import DTYPES
from .kinds import key_kind, value_kind
from .store import spread
from .turned_values import head_widths

PACKED = ("masks", "payload", "offsets", "grid", "sinks", "zeros")


def modern_state(
    header: Mapping[str, Any], buffers: Sequence[Any]
) -> tuple[Mapping[str, Any], list[Any]]:
    """A state's header and buffers, in forms that there are.

    Raises:
        ValueError: They do not fit each other.
    """
    buffers, config = list(buffers), header["config"]
    if not isinstance(config, Mapping):
        raise ValueError("its setting is no object")
    packed, quantized = has_packed_keys(config), has_quantized_values(config)
    if not packed and not quantized:
        setting = DeltaConfig.from_dict(config)
        buffers = _with_sequences(setting, buffers)
        return header, _with_short_scales(setting, header, buffers)
    gone = [name for name, is_old in (("key_bits", packed), ("value_bits", quantized)) if is_old]
    fields = {name: value for name, value in config.items() if name not in gone}
    setting = DeltaConfig.from_dict(fields)
    header = {**header, "config": fields}
    count = 3 if quantized else 1
    of_keys = len(PACKED) if packed else key_kind(setting).n_arrays - 1
    if len(buffers) != 1 + count + of_keys:
        raise ValueError(f"it has {len(buffers) + 1} parts")
    if all(x is None for x in buffers):
        return header, [None] * (2 + key_kind(setting).n_arrays - 1)
    say("[prompt_cache] keys or values were packed by an earlier version; they are in full now.")
    keys, values, others = buffers[0], buffers[1 : 1 + count], buffers[1 + count :]
    # Nothing empty: dimensions of arrays without numbers may be anything.
    if any(not isinstance(x, mx.array) or x.ndim != 4 or not x.size for x in (keys, *values)):
        raise ValueError("it lacks one of its buffers")
    name = header.get("type")  # of full keys, where others are stored in fewer bits
    if (packed or name is not None) and name not in DTYPES:
        raise ValueError(f"it is of type {str(name)[:40]!r}")
    dtype = keys.dtype if name is None else DTYPES[name]
    if quantized:
        values = [_plain_values(values, config["value_bits"], dtype)]
    if not packed:
        return header, [keys, *values, *others]
    arrays = dict(zip(PACKED, others, strict=True))
    counts, made = _held_keys(setting, config["key_bits"], header, keys, arrays, values[0].shape[2])
    whole, zeros, spare = made
    full = [mx.array(whole).astype(dtype), *values, mx.array(zeros), mx.array(spare).astype(dtype)]
    return {**header, **counts}, full


def _with_sequences(setting: DeltaConfig, buffers: list[Any]) -> list[Any]:
    """A state's buffers, held keys by lanes with the sequence of their tokens before the sinks."""
    if setting.key_format != "deltas" or len(buffers) < 2:
        return buffers
    last = buffers[-2]  # that sequence, or zeros of each block
    if last is None:
        parts = value_kind(setting).count_arrays(setting) + key_kind(setting).n_arrays
        return [*buffers, None] if len(buffers) == parts - 1 else buffers
    if not isinstance(last, mx.array):
        raise ValueError("it lacks one of its buffers")
    sinks = buffers[-1]
    no_sinks = isinstance(sinks, mx.array) and sinks.dtype == mx.uint8
    if last.dtype != mx.int32 or last.ndim != 3 or no_sinks:
        return buffers  # no zeros: the sequence is there, or something else is missing
    tokens = mx.arange(setting.block_size, dtype=mx.uint8)
    sequence = mx.broadcast_to(tokens, (*last.shape, setting.block_size))
    return [*buffers[:-1], mx.contiguous(sequence), buffers[-1]]


def _with_short_scales(
    setting: DeltaConfig, header: Mapping[str, Any], buffers: list[Any]
) -> list[Any]:
    """A state's buffers, turned values with scales of a byte."""
    of_values, of_keys = value_kind(setting).count_arrays(setting), key_kind(setting).n_arrays
    if setting.value_format != "rotated" or len(buffers) != of_keys + of_values + 1:
        return buffers
    near, (words, scales, biases), others = buffers[0], buffers[1:4], buffers[4:]
    if all(x is None for x in buffers):
        return buffers[1:]
    if any(not isinstance(x, mx.array) or x.ndim != 4 for x in (near, words, scales, biases)):
        raise ValueError("it lacks one of its buffers")
    say("[prompt_cache] values were coded by an earlier version; they are coded anew.")
    (B, H), D = near.shape[:2], int(header["model"][2])
    widths, group = head_widths(setting, H), value_group(D)
    ends = np.cumsum([0, *value_words(D, widths)])
    grid = (B, 1, words.shape[2], H * D // group)
    fits = words.dtype == mx.uint32 and words.shape == (*grid[:3], ends[-1])
    if (
        not fits
        or near.dtype not in LARGEST
        or any(x.dtype != near.dtype or x.shape != grid for x in (scales, biases))
    ):
        raise ValueError("saved values do not fit the setting or each other")
    if not words.size:
        return [near, words, mx.zeros(grid, mx.uint8), *others]
    units, zeros = (
        x.astype(mx.float32).reshape(B, -1, H, D // group).swapaxes(1, 2) for x in (scales, biases)
    )
    turned = [
        mx.dequantize(words[:, 0, :, first:end], units[:, i], zeros[:, i], group, width)
        for i, (width, first, end) in enumerate(zip(widths, ends, ends[1:], strict=False))
    ]
    return [near, *encode_turned(mx.stack(turned, axis=1), near.dtype, widths), *others]


def _plain_values(parts: Sequence[mx.array], bits: int, dtype: mx.Dtype) -> mx.array:
    """Values [B, Hkv, capacity, Dv] of words, scales and biases."""
    words, scales, biases = parts
    groups = scales.shape[3]
    fits = words.dtype == mx.uint32 and scales.shape == biases.shape
    fits &= scales.dtype in LARGEST and biases.dtype == scales.dtype
    fits &= scales.shape[:3] == words.shape[:3] and groups > 0
    if not fits or words.shape[3] * 32 / bits / groups not in (32, 64):
        raise ValueError(f"saved values are not {bits}-bit codes")
    group = words.shape[3] * 32 // bits // groups
    return mx.dequantize(words, scales.astype(dtype), biases.astype(dtype), group, bits)


def _held_keys(
    setting: DeltaConfig,
    bits: int,
    header: Mapping[str, Any],
    near: mx.array,
    arrays: Mapping[str, Any],
    capacity: int,
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What a header says of held keys in full, and their buffers: keys, zeros and the spare."""
    size = setting.block_size
    _check_shapes(setting, bits, near, arrays)
    B, H, room, D = near.shape
    counts = [spread(header[name], B) for name in ("lengths", "encoded", "firsts")]
    counts.append(spread(header.get("lost", [first // size for first in counts[2]]), B))
    dropped = spread(header.get("dropped", [0]), B)
    if any(len(own) != B for own in (*counts, dropped)):
        raise ValueError("it has counts for different numbers of rows")
    lengths, encoded, firsts, lost = counts
    lengths, encoded = stored(lengths, dropped, size), stored(encoded, dropped)
    lengths = [max(0, length) for length in lengths]
    blocks = arrays["offsets"].shape[2]
    for length, done, first, gone in zip(lengths, encoded, firsts, lost, strict=True):
        fits = 0 <= done <= blocks and done * size <= length <= capacity
        fits &= first % size == 0 and 0 <= first <= done * size and length - first <= room
        if not fits or not first // size <= gone <= length // size:
            raise ValueError(
                f"it counts {length} tokens, {done} encoded blocks and near keys from {first} on"
            )
    found = {name: _as_numpy(x) for name, x in arrays.items()}
    far = _unpacked(found, bits, near.dtype, D, encoded)
    own = _as_numpy(near)
    keys = np.zeros((B, H, capacity, D), np.float32)
    spare = np.zeros((B, H, size, D), np.float32)
    zeros = np.zeros((B, H, -(-capacity // size)), np.int32)
    held, valid = [], []
    for row, (length, done, first) in enumerate(zip(lengths, encoded, firsts, strict=True)):
        border = done * size
        keys[row, :, :border] = far[row, :, :border]
        keys[row, :, border:length] = own[row, :, border - first : length - first]
        zeros[row, :, :done] = found["zeros"][row, :, :done]
        # Of blocks beyond the encoded ones, held keys may stand in for full ones: not held again.
        held.append(max(done, lost[row]))
        valid.append(0 <= first <= border - size and lost[row] < done)
        if valid[-1]:
            spare[row] = own[row, :, border - size - first : border - first]
    return {"held": held, "spare_valid": valid}, (keys, zeros, spare)


def _check_shapes(
    setting: DeltaConfig, bits: int, near: mx.array, arrays: Mapping[str, Any]
) -> None:
    """Refuse buffers that do not fit the setting or each other."""
    size = setting.block_size
    needed = [x for name, x in arrays.items() if name not in ("grid", "sinks")]
    if any(not isinstance(x, mx.array) for x in needed) or arrays["offsets"].ndim != 3:
        raise ValueError("it lacks one of its buffers")
    (B, H, room, D), blocks = near.shape, arrays["offsets"].shape[2]
    codes = bits < 16
    fits = near.dtype in LARGEST and D in HEAD_DIMS and size <= 64
    if not fits or room != (setting.window_blocks + 2) * size:
        raise ValueError("saved near keys do not fit the setting")
    shapes: dict[str, tuple[tuple[int, ...] | None, mx.Dtype]] = {
        "masks": ((B, H, blocks, size - 1, -(-D // 32)), mx.uint32),
        "payload": ((B, *arrays["payload"].shape[1:2]), mx.uint32),
        "offsets": ((B, H, blocks), mx.int32),
        "grid": ((B, H, blocks, 2, D) if codes else None, near.dtype),
        "sinks": ((B, H, setting.sinks, D) if codes and setting.sinks else None, near.dtype),
        "zeros": ((B, H, blocks), mx.int32),
    }
    for name, (shape, dtype) in shapes.items():
        array = arrays[name]
        found = (None, dtype) if array is None else (tuple(array.shape), array.dtype)
        if found != (shape, dtype):
            raise ValueError(f"saved {name} do not fit the setting or each other")


def _unpacked(
    arrays: Mapping[str, Any], bits: int, dtype: mx.Dtype, head_dim: int, encoded: Sequence[int]
) -> np.ndarray:
    """Held keys [B, Hkv, blocks * size, D] of the rows' encoded blocks, float32."""
    masks, payload, offsets = arrays["masks"], arrays["payload"], arrays["offsets"]
    grid, sinks, per_word = arrays["grid"], arrays["sinks"], 32 // bits
    B, H, _, rows, W = masks.shape
    done = max(encoded, default=0)
    masks, offsets = masks[:, :, :done], offsets[:, :, :done].astype(np.int64)
    changed = np.unpackbits(masks.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    changed = changed.reshape(B, H, done, rows, 32 * W)[..., :head_dim].astype(np.int32)
    changed = np.concatenate([np.ones((B, H, done, 1, head_dim), np.int32), changed], axis=3)
    in_order = changed.reshape(B, H, done, (rows + 1) * head_dim)
    rank = in_order.cumsum(axis=-1).reshape(changed.shape) - 1
    latest = np.maximum.accumulate(rank * changed, axis=3)
    index = latest // per_word + offsets[..., None, None]
    held: Any = np.zeros(changed.shape, np.float32)
    for row in range(B):
        own = slice(0, encoded[row])
        words = index[row, :, own]
        if words.size and not 0 <= words.min() <= words.max() < payload.shape[1]:
            raise ValueError(f"saved offsets of row {row} do not fit its masks and its payload")
        shift = (bits * (latest[row, :, own] % per_word)).astype(np.uint32)
        codes = (payload[row][words] >> shift) & np.uint32(2**bits - 1)
        if bits < 16:
            low, step = (grid[row, :, own, i][:, :, None] for i in (0, 1))
            with np.errstate(invalid="ignore", over="ignore"):
                value = np.minimum(low + codes.astype(np.float32) * step, LARGEST[dtype])
            held[row, :, own] = _as_numpy(mx.array(value.astype(np.float32)).astype(dtype))
        else:
            held[row, :, own] = _as_numpy(mx.array(codes.astype(np.uint16)).view(dtype))
    held = held.reshape(B, H, done * (rows + 1), head_dim)
    if sinks is not None:
        count = min(sinks.shape[2], held.shape[2])
        held[:, :, :count] = sinks[:, :, :count]
    return held


def _as_numpy(array: Any) -> Any:
    """The array in NumPy, floats as float32."""
    if array is None:
        return None
    floats = mx.issubdtype(array.dtype, mx.floating)
    return np.array(array.astype(mx.float32) if floats else array)
