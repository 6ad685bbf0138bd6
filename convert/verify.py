"""Comparing a converted directory with its source, in a process of its own.

Both models run in float32, one layer in memory at a time, on the same text. The directory is
loaded by ``mlx_delta.load``, so that what is compared is what a user will run. Weights that
should be exact are compared one by one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .errors import ConvertError
from .layers import Layers, Streamed, dequantize
from .pipeline import STEP_ELEMENTS
from .sources import SourceOptions, open_source
from .weights import Affine, Source, Ternary, Weight

TOKENS = 64
CACHE_BYTES = 64 << 20
TEXT = (
    "The library opened early on the first cold morning of the year. A man with a grey coat "
    "asked for the map of the harbour, and the clerk, who knew every drawer by heart, found it "
    "within a minute. 'You will see', she said, 'that the two piers of 1907 are gone; what is "
    "left are 3 walls and the old light.' He thanked her, paid 25 cents for a copy and left."
)


def run_verification(source: str, folder: Path, reading: SourceOptions) -> dict[str, Any]:
    """Verify in a fresh process; what it found, for the report.

    Raises:
        ConvertError: The result could not be loaded, or a weight that should be exact is not.
    """
    job = json.dumps({"source": source, "folder": str(folder), "reading": asdict(reading)})
    process = subprocess.run(
        [sys.executable, "-m", "mlx_delta.convert", "verify", job],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConvertError(f"the result could not be verified: {reason}")
    found = json.loads(lines[-1])
    if found["wrong"]:
        raise ConvertError(
            f"the result is wrong: {found['wrong'][0]} does not equal the source "
            f"({len(found['wrong'])} such); please report this."
        )
    if not found["finite"]:
        raise ConvertError("the result is wrong: its logits are not finite; try --dtype bfloat16.")
    return dict(found)


def main(arguments: list[str]) -> int:
    """The fresh process: prints what it found as one line of JSON."""
    mx.set_cache_limit(CACHE_BYTES)  # a GPU's freed buffers
    job = json.loads(arguments[0])
    reading = SourceOptions(**job["reading"])
    source = open_source(job["source"], reading, tokenizer=False)
    print(json.dumps(verify(source, Path(job["folder"]))))
    return 0


def verify(source: Source, folder: Path) -> dict[str, Any]:
    """Compare a directory with its source.

    Returns:
        ``exact``: weights found equal; ``wrong``: those that should be and are not; Kullback-
        Leibler divergence (source to result), top-1 agreement and losses on the text; for
        ternary models divergence and loss with int8 activations, too.
    """
    from mlx_delta.loading import load
    from mlx_delta.system.devices import has_gpu

    model, tokenizer = load(folder, delta=None, lazy=True)
    tokens = _tokens(tokenizer, source)
    layers = Layers(source)
    inputs = mx.array(tokens[:-1])[None]
    new_hidden = layers.scale(model.model.embed_tokens(inputs).astype(mx.float32))
    old_hidden = layers.embed(tokens[:-1])
    # Ternary layers round activations to int8, which no other loader does: run with and without.
    int8_hidden = new_hidden if set_activation_bits(model) else None
    exact, wrong = 0, []

    def compare_weights(prefixes: tuple[str, ...]) -> None:
        nonlocal exact
        for name, weight in source.weights.items():
            if name.startswith(prefixes) and not weight.lossy and len(weight.shape) == 2:
                same = _equal(model, name, weight)
                exact += same is True
                wrong.extend([name] if same is False else [])

    compare_weights(("model.embed_tokens.", "lm_head."))
    for i in range(source.arch.layers):
        compare_weights((f"model.layers.{i}.",))
        old_hidden = layers.run(i, old_hidden)
        layer, mask = model.model.layers[i], layers.mask(i, old_hidden)
        if not has_gpu():
            unpack_layer(layer)
        if int8_hidden is not None:
            int8_hidden = layer(int8_hidden, mask=mask).astype(mx.float32)
            mx.eval(int8_hidden)
            set_activation_bits(layer, None)
        new_hidden = layer(new_hidden, mask=mask).astype(mx.float32)
        mx.eval(new_hidden)
        model.model.layers[i] = None  # its weights are not needed any more
    old = layers.head(layers.norm(old_hidden))

    def logits(hidden: mx.array) -> mx.array:
        head = model.model.embed_tokens if source.arch.tied else model.lm_head
        return stream_quantized(head)(model.model.norm(hidden).astype(mx.float32))[0]

    found = _compare(old[0], logits(new_hidden), tokens[1:])
    if int8_hidden is not None:
        int8 = _compare(old[0], logits(int8_hidden), tokens[1:])
        found |= {"kl_int8": int8.get("kl"), "loss_int8": int8.get("loss_result")}
        found["summary"] += f"; with int8 activations loss {int8.get('loss_result')}"
    return found | {"exact": exact, "wrong": wrong}


def stream_quantized(layer: Any) -> Streamed:
    """A layer of the result by way of its dequantized weights.

    Without a GPU that is many times as fast as MLX's quantized product.
    """

    def rows(start: int, stop: int) -> mx.array:
        return dequantize(layer, slice(start, stop)).astype(mx.float32)

    outputs, width = layer.weight.shape[0], layer.weight.shape[1] * 32 // getattr(layer, "bits", 32)
    bias = layer.bias if "bias" in layer else None
    return Streamed(rows, outputs, max(1, STEP_ELEMENTS // width), bias)


def unpack_layer(layer: Any) -> None:
    """Let a layer's quantized linears multiply with dequantized weights."""
    for part in (layer.self_attn, layer.mlp):
        for name, module in part.children().items():
            if type(module) is nn.QuantizedLinear:
                setattr(part, name, stream_quantized(module))


def set_activation_bits(module: Any, *bits: int | None) -> bool:
    """Set them, if given, on all ternary layers; whether there are any that round."""
    from mlx_delta.ternary.linear import TernaryLinear

    found = False
    for _, layer in module.named_modules():
        if isinstance(layer, TernaryLinear):
            found = found or layer.activation_bits is not None
            for value in bits:
                layer.activation_bits = value
    return found


def _tokens(tokenizer: Any, source: Source) -> list[int]:
    """A text's tokens, all within the vocabulary."""
    count = min(TOKENS, source.arch.positions) + 1
    tokens = [token for token in tokenizer.encode(TEXT) if token < source.arch.vocab]
    # A tokenizer for a test may know few words; the loss then says little, the rest as much.
    filler = np.random.RandomState(0).randint(0, source.arch.vocab, count)
    return [*tokens, *map(int, filler)][: max(count, 2)]


def _equal(model: Any, name: str, weight: Weight) -> bool | None:
    """Whether a layer of the result holds the source's values; ``None`` where it need not.

    Ternary layers: the codes must be the same, the scale within its type's rounding. Layers
    that were quantized in the source and stayed so, and floating-point layers of the same type:
    every bit.
    """
    module = model
    same: bool | None
    for part in name.rpartition(".")[0].split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    rows = weight.shape[0]
    multiple = weight.row_multiple
    step = max(multiple, STEP_ELEMENTS // weight.shape[1] // multiple * multiple)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        old = weight.read(start, stop)
        if isinstance(old, Ternary):
            same = _same_ternary(module, old, start, stop)
        elif isinstance(old, Affine):
            same = _same_affine(module, weight, old, start, stop)
        elif hasattr(module, "scales"):
            return None
        else:
            new = module.weight[start:stop].astype(mx.float32)
            same = bool(mx.array_equal(new, old.astype(mx.float32))) or None
        if same is not True:
            return same
    return True


def _same_ternary(module: Any, old: Ternary, start: int, stop: int) -> bool:
    """Compare codes."""
    if hasattr(module, "weight_scale"):
        quarter = module.weight.shape[0]
        packed = np.array(module.weight)
        rows = [(packed[r % quarter] >> (2 * (r // quarter))) & 3 for r in range(start, stop)]
        codes = np.stack(rows)
    else:
        if not hasattr(module, "scales") or module.bits != 2:
            return False
        words = np.array(module.weight[start:stop])
        codes = (
            ((words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32)) & 3)
            .reshape(len(words), -1)
            .astype(np.uint8)
        )
        zero = np.array(module.scales[start:stop].astype(mx.float32)) == 0
        codes[np.repeat(zero, codes.shape[1] // zero.shape[1], axis=1)] = 1
    expected = old.codes
    if old.scales.size > 1:
        expected = expected.copy()
        expected[np.repeat(old.scales == 0, expected.shape[1] // old.scales.shape[1], axis=1)] = 1
    return bool(np.array_equal(codes, expected))


def _same_affine(module: Any, weight: Weight, old: Affine, start: int, stop: int) -> bool | None:
    """Compare codes and scales, where the layer was kept as it was."""
    if getattr(module, "bits", 0) != weight.bits or module.group_size != weight.group_size:
        return None
    if not bool(mx.array_equal(module.weight[start:stop], old.codes)):
        return False
    scales = module.scales[start:stop].astype(mx.float32)
    if not bool(mx.array_equal(scales, old.scales.astype(mx.float32))):
        return None  # rounded to the type that was asked for
    return True


def _compare(old: mx.array, new: mx.array, targets: list[int]) -> dict[str, Any]:
    """Divergence, agreement and losses of logits [L, vocabulary]."""
    old = old - mx.logsumexp(old, axis=-1, keepdims=True)
    new = new - mx.logsumexp(new, axis=-1, keepdims=True)
    divergence = float(mx.mean(mx.sum(mx.exp(old) * (old - new), axis=-1)))
    agreement = float(mx.mean(mx.argmax(old, axis=-1) == mx.argmax(new, axis=-1)))
    index = mx.array(targets)[:, None]
    losses = [-float(mx.mean(mx.take_along_axis(x, index, axis=-1))) for x in (old, new)]
    finite = bool(np.isfinite([divergence, *losses]).all())
    values = {
        "tokens": len(targets),
        "kl": float(f"{max(divergence, 0.0):.6g}"),
        "top1_agreement": float(f"{agreement:.6g}"),
        "loss_source": float(f"{losses[0]:.6g}"),
        "loss_result": float(f"{losses[1]:.6g}"),
    }
    summary = (
        f"KL {values['kl']:.3g}, top-1 agreement {agreement:.1%}, loss {losses[0]:.4f} -> "
        f"{losses[1]:.4f} on {len(targets)} tokens"
    )
    return {**(values if finite else {}), "finite": finite, "summary": summary}
