"""Texts with held keys by lanes and queries for `deltas_decode`, and its specification."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np

from mlx_delta import DeltaConfig
from mlx_delta.method import deltas as ref
from mlx_delta.ops import deltas_kernel
from mlx_delta.ops.storage import to_storage

from ..metal_cpu import MetalBench
from .code_case import CodedCase, assert_close
from .common import STORED, as_float, on_bench


def lanes(
    widths: tuple[int, ...] = (4, 4, 4, 4, 4, 4, 4, 4),
    values: tuple[int, ...] | None = (4, 4),
    others: tuple[int, ...] | None = None,
    seed: int = 0,
    **changes: Any,
) -> DeltaConfig:
    """A setting of one layer with lanes of these widths, their channels in a random order.

    Args:
        widths: Of the lanes, each for four channels of either half of a head.
        values: The width of each kv head's values; ``None``: they are plain, of two heads.
        others: The widths of lanes in all heads but the first, if they are others.
        seed: Of the order, which is another one in each head.
        **changes: Other fields.
    """
    settings: dict[str, Any] = {"key_format": "deltas", "key_bits": 4, "sinks": 4, "window": 64}
    rng = np.random.default_rng(seed)
    rows = []
    for head in range(len(values) if values else 2):
        own = np.repeat(others if others and head else widths, 4)
        rows.append("".join(map(str, rng.permutation(own))) * 2)
    settings["key_widths"] = (tuple(rows),)
    settings["level"] = 0.05
    if values:
        settings |= {"value_bits": 4, "value_widths": (values,)}
    return DeltaConfig(**{**settings, **changes}).for_layer(0, 1)


@dataclasses.dataclass
class DeltaCase(CodedCase):
    """A case whose far keys are held, and stored by lanes."""

    def _keys(self, row: int, head: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        setting, kind = self.setting, STORED[self.dtype]
        size, sinks = setting.block_size, setting.sinks
        keys = as_float(to_storage(self.keys[row, head, :length]))
        assert setting.key_widths is not None and setting.key_widths[0]
        widths = np.array(list(map(int, setting.key_widths[0][head])))
        weights, salience = setting.sensitivities_of_layer(self.heads[1], self.head_dim)
        held = keys.copy()
        for start in range(0, length - size + 1, size):
            block = ref.pack_block(
                keys[start : start + size],
                *(weights[head], salience[head], setting.run_level),
                *(setting.threshold_mode == "optimal", max(0, sinks - start), widths, kind),
            )
            held[start : start + size] = ref.unpack_block(block, size, widths, kind)
        held[:sinks] = keys[:sinks]
        return keys, held


def check(bench: MetalBench, case: DeltaCase, mask: bool = False, **options: Any) -> None:
    """The kernel runs, and gives what the specification says."""
    cache = case.cache()
    built_in = cache.make_mask(case.steps) if mask else None
    with (
        on_bench(bench, **options),
        mock.patch.object(deltas_kernel, "decode", wraps=deltas_kernel.decode) as spy,
    ):
        output = case.step(cache, built_in)
    assert spy.called, "the kernel was not used"
    assert_close(output, case.expected(), case)
