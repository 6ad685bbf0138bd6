"""Ways to keep keys and values, by the names that the command lines give them.

``evaluate``, ``benchmark`` and ``calibrate`` compare settings on one loaded model: a setting is
only a way to make caches, so the weights are shared and the settings can take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_delta.attention.dense import stock_cache
from mlx_delta.cache import DeltaKVCache, HeldKeys
from mlx_delta.cache.check_state import leaves, length_of
from mlx_delta.cache.layout import replace_ordinary
from mlx_delta.cache.window_only import WindowOnlyCache
from mlx_delta.cache.written_out import WrittenOut
from mlx_delta.config import DeltaConfig
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.system.kv import check_holds, written_fields
from mlx_delta.wording import nearest

from .baselines import BASELINES, QuantizedStore

QUANTIZED = ("kv8", "kv4")  # mlx-lm's
UNCALIBRATED = "uncalibrated"
KINDS = (
    "dense",
    "delta",
    UNCALIBRATED,
    "paper",
    *QUANTIZED,
    *BASELINES,
    "rotating",
    "window-only",
    "stock",
)

PREFILL_STEP = 2048  # tokens of a prompt at a time, as in mlx-lm
ROTATING_KEEP = 4  # first tokens that mlx-lm's --max-kv-size never drops


@dataclass(frozen=True)
class Setting:
    """One way to keep keys and values.

    Attributes:
        name: As it was written; names tables and results.
        kind: One of ``KINDS``.
        delta: For ``delta``, ``paper`` and ``window-only``.
        kv_bits: For ``kv8`` and ``kv4``: mlx-lm's quantized cache.
        max_size: For ``rotating``: tokens kept.
        sampled: Its sensitivities are those that ``load`` finds for a model that was not
            calibrated, whatever the model has (:func:`mlx_delta.measure.choice.with_samples`).
    """

    name: str
    kind: str
    delta: DeltaConfig | None = None
    kv_bits: int | None = None
    max_size: int | None = None
    sampled: bool = False

    @property
    def dense_up_to(self) -> int:
        """Tokens of a text up to which everything is as with a dense cache."""
        delta = self.delta
        if self.kind not in ("delta", "window-only") or delta is None:
            return 0
        if delta.key_bits is not None or delta.value_bits is not None or delta.block_fraction:
            return 0
        return (delta.window_blocks + 1) * delta.block_size

    def make_caches(self, model: nn.Module, prompt_tokens: int | None = None) -> list[Any]:
        """New caches for a model; ``prompt_tokens`` as for its ``make_cache``.

        Layers with windows or recurrent states get mlx-lm's own, whatever the setting. A setting
        that has no sensitivities takes those that the model was loaded with.
        """
        delta = self.delta
        if delta is not None and prompt_tokens is not None:
            delta = delta.resolve(prompt_tokens)
        own = getattr(getattr(model, "args", None), "delta", None)
        if delta is not None and delta.cuts_runs and delta.sensitivities is None and own:
            delta = delta.changed(sensitivities=own.sensitivities)
        caches = make_prompt_cache(model)

        def make(index: int) -> Any:
            if delta is not None:
                cache = WindowOnlyCache if self.kind == "window-only" else DeltaKVCache
                own_cache = cache(delta.for_layer(index, len(caches)))
                own_cache.prompt_length = prompt_tokens  # at its end tiles are all computed
                return own_cache
            if self.kind == "stock":
                return stock_cache()
            if self.max_size is not None:
                return RotatingKVCache(max_size=self.max_size, keep=ROTATING_KEEP)
            if self.kind in BASELINES:
                baseline, bits = BASELINES[self.kind]
                return baseline(bits)
            return KVCache()

        return replace_ordinary(caches, make)

    def forward(self, model: nn.Module, tokens: Sequence[int], caches: list[Any]) -> mx.array:
        """Logits [L, vocabulary] of the next ``tokens``; evaluated, and the caches updated.

        As in mlx-lm's generation, a quantized cache is dense within the first call and quantized
        after it. What any query sees does not depend on how a text is cut into later calls.
        """
        logits = [
            self._step(model, list(part), caches) for part in self._parts(list(tokens), caches)
        ]
        return logits[0] if len(logits) == 1 else mx.concatenate(logits)

    def prefill(
        self, model: nn.Module, tokens: Sequence[int], caches: list[Any], step: int = PREFILL_STEP
    ) -> mx.array:
        """Feed a prompt in chunks, its last token by itself; logits [vocabulary] after it.

        As in mlx-lm's generation, which never computes the logits of the tokens before.

        Raises:
            ValueError: The prompt is empty.
        """
        if not tokens:
            raise ValueError("[prefill] the prompt is empty; give at least one token.")
        for start in range(0, len(tokens) - 1, step):
            part = list(tokens[start : min(start + step, len(tokens) - 1)])
            model(mx.array(part)[None], cache=caches)
            self.settle(caches)
        return self.forward(model, tokens[-1:], caches)[-1]

    def _parts(self, tokens: list[int], caches: list[Any]) -> Iterator[list[int]]:
        seen = length_of(caches)
        if self.max_size is not None and seen > 0:
            # Several queries at once would not see the first tokens that a rotating cache keeps.
            return ([token] for token in tokens)
        periods = {c.period for c in caches if isinstance(c, QuantizedStore) and c.period}
        if periods and seen > 0:
            size = min(periods)
            cuts = [0, *range(size - seen % size, len(tokens), size), len(tokens)]
            return (tokens[a:b] for a, b in itertools.pairwise(cuts))
        return iter([tokens])

    def _step(self, model: nn.Module, tokens: list[int], caches: list[Any]) -> mx.array:
        logits = model(mx.array(tokens)[None], cache=caches)[0]
        mx.eval(logits)
        self.settle(caches)
        return logits

    def settle(self, caches: list[Any]) -> None:
        """Compute what the caches hold, quantized if it is to be."""
        if self.kv_bits is not None:
            # As mlx-lm does; but it gives up at a cache with a window, which has no such form.
            for i, cache in enumerate(caches):
                if type(cache) is KVCache:
                    caches[i] = cache.to_quantized(group_size=64, bits=self.kv_bits)
        mx.eval([cache.state for cache in caches])


def parse_settings(names: Sequence[str], default: DeltaConfig | None = None) -> list[Setting]:
    """Settings from their names on the command line.

    ``dense``, ``kv8`` and ``kv4`` (mlx-lm's caches), ``kv4-rotated`` (as llama.cpp quantizes),
    ``kivi4`` and ``kivi2`` (keys by channel), ``rotating:1024`` (mlx-lm's ``--max-kv-size``),
    ``delta`` and ``delta:level=0.1,key_bits=4`` (any field of
    :class:`DeltaConfig`, as :meth:`DeltaConfig.parse` reads them), ``delta:kv=balanced`` (as
    ``--kv``), ``delta:sparsity=0.75`` and
    ``delta:kl=0.002`` (the level that a calibrated model's curve says), ``uncalibrated`` (the delta
    as on a model that was never calibrated), ``paper:threshold=0.6``
    (the paper's preset), ``window-only`` (the keys that ``delta`` would hold are dropped),
    ``stock`` (``dense`` by MLX's own attention, even where ours is faster).

    Args:
        names: The names.
        default: What ``delta`` changes; the model's own setting.

    Raises:
        ValueError: A name or an option is unknown, with the nearest ones; or a value is wrong.
    """
    settings = [parse_setting(name, default) for name in names]
    for i, setting in enumerate(settings):
        if setting.name in names[:i]:
            raise ValueError(f"[parse_settings] {setting.name!r} is given twice; drop one.")
    return settings


def parse_setting(name: str, default: DeltaConfig | None = None) -> Setting:
    """One setting from its name; see :func:`parse_settings`."""
    kind, colon, rest = name.partition(":")
    if kind not in KINDS:
        raise ValueError(
            f"[parse_settings] unknown setting {kind!r}{nearest(kind, KINDS)}; known are "
            f"{', '.join(KINDS)}."
        )
    if colon and not rest:
        raise ValueError(f"[parse_settings] {name!r} has nothing after its colon.")
    if kind in ("dense", "stock", *QUANTIZED, *BASELINES):
        if rest:
            raise ValueError(f"[parse_settings] {kind!r} takes no options but got {rest!r}.")
        return Setting(name, kind, kv_bits=int(kind[2:]) if kind in QUANTIZED else None)
    if kind == "rotating":
        if not rest.isdecimal() or int(rest) <= ROTATING_KEEP:
            raise ValueError(
                f"[parse_settings] {name!r}: give the tokens to keep, more than {ROTATING_KEEP}, "
                "as in rotating:1024."
            )
        return Setting(name, kind, max_size=int(rest))
    bases = {"paper": DeltaConfig.paper(), UNCALIBRATED: DeltaConfig()}
    sampled = kind == UNCALIBRATED
    try:
        delta = _parse_delta(rest, bases.get(kind, default or DeltaConfig()))
    except ValueError as error:
        raise ValueError(f"[parse_settings] in {name!r}: {error}") from error
    return Setting(name, "delta" if sampled else kind, delta=delta, sampled=sampled)


def _parse_delta(text: str, base: DeltaConfig) -> DeltaConfig:
    """A setting of the delta; ``sparsity=0.75`` and ``kl=0.002`` stand for the level of that."""
    wanted: dict[str, float] = {}
    fields = []
    for field in text.split(","):
        key, _, value = field.partition("=")
        if key not in ("sparsity", "kl"):
            fields.append(field)
            continue
        try:
            wanted[key] = float(value)
        except ValueError as error:
            raise ValueError(f"{key} must be a number but got {value!r}.") from error
    changes = written_fields(",".join(fields))
    delta = base.changed(**changes)
    for name in ("level", "threshold"):
        if changes.get(name):
            check_holds(delta, f"{name}={changes[name]}")
    if not wanted:
        return delta
    if len(wanted) > 1:
        raise ValueError("sparsity and kl both set the level; give one of them.")
    (wish,) = wanted
    if changes.get("level") is not None:
        raise ValueError(f"{wish} and level={changes['level']} both set the level; drop one.")
    check_holds(delta, wish)
    if not isinstance(delta.sensitivities, Sensitivities) or not delta.sensitivities.curve:
        raise ValueError(
            f"{wish} needs a calibrated model; run `python -m mlx_delta.calibrate` "
            "first, or give a level."
        )
    return delta.changed(
        level=delta.sensitivities.level_for(wanted.get("sparsity"), wanted.get("kl"))
    )


def scratch_nbytes(caches: Sequence[Any]) -> int:
    """Bytes that caches keep written out besides their own, while tokens are decoded."""
    return sum(c.scratch_nbytes for c in leaves(caches) if isinstance(c, HeldKeys))


def cache_nbytes(caches: Sequence[Any]) -> int:
    """Bytes that caches have allocated, floats counted at 16 bits each.

    Models run in float32 where there is no GPU, and their dense caches with them; counted like
    this, a cache takes the same bytes on every machine.
    """
    return sum(_nbytes(cache) for cache in caches)


def far_share(caches: Sequence[Any]) -> float | None:
    """What far tokens take, of what they would as 16-bit floats; ``None`` where none is far.

    Of models in float32 too, whose floats are counted at 16 bits.
    """
    pairs = [cache.far_bytes(2) for cache in leaves(caches) if isinstance(cache, HeldKeys)]
    dense = sum(whole for _, whole in pairs)
    return sum(own for own, _ in pairs) / dense if dense else None


def _nbytes(item: Any) -> int:
    if isinstance(item, mx.array):
        floats = mx.issubdtype(item.dtype, mx.floating)
        return item.size * min(item.itemsize, 2) if floats else item.nbytes
    if isinstance(item, WrittenOut):
        return 0  # scratch
    if isinstance(item, WindowOnlyCache):
        return item.kept_nbytes(_nbytes(vars(item)))
    if isinstance(item, dict):
        return sum(_nbytes(value) for value in item.values())
    if isinstance(item, (list, tuple)):
        return sum(_nbytes(value) for value in item)
    return _nbytes(vars(item)) if hasattr(item, "__dict__") else 0
