"""What BitNet's weights cost here and in stock mlx-lm: bytes in decode, time in prefill.

    python examples/bitnet_figures.py bytes   # of weights for each token, for the 2B model's shape
    python examples/bitnet_figures.py speed   # against an equally large Llama in 4 bits, same BLAS

Both make random models; no weight of the 2B model is ever in memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx_delta  # noqa: F401  isort: skip  (before MLX: it chooses the BLAS)
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import bitnet as stock_bitnet
from mlx_lm.models import llama as stock_llama
from mlx_lm.models.cache import KVCache

from mlx_delta import DeltaConfig
from mlx_delta.measure.traffic import weight_bytes
from mlx_delta.models import bitnet
from mlx_delta.system.blas import blas_status
from mlx_delta.ternary import codes as ternary

MICROSOFT_2B = {
    "model_type": "bitnet",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def show_bytes() -> None:
    """Print the bytes of weights read for each decoded token."""
    args = bitnet.ModelArgs.from_dict(MICROSOFT_2B)
    print("head     MLX's product  the kernel   (GB for each token)")
    for bits in (None, 8, 6, 4):
        model = bitnet.Model(args)
        model.set_dtype(mx.bfloat16)
        if bits is not None:
            nn.quantize(model, group_size=64, bits=bits)
        affine, kernel = (weight_bytes(model, kernel) / 1e9 for kernel in (False, True))
        name = "bf16" if bits is None else f"{bits}-bit"
        print(f"{name:6} {affine:14.3f} {kernel:12.3f}")


def random_bitnet(config: dict[str, Any], delta: DeltaConfig | None) -> bitnet.Model:
    """A BitNet with random codes, and an embedding in 4 bits."""
    model = bitnet.Model(bitnet.ModelArgs.from_dict({**config, "delta": delta}))
    for _, layer in model.ternary_layers():
        shape = (layer.weight.shape[0], layer.weight.shape[1] * ternary.CODES_PER_WORD)
        layer.weight = ternary.pack_words(mx.random.randint(0, 3, shape).astype(mx.uint8))
        layer.scales, layer.biases = layer.scales * 0.02, layer.biases * 0.02
    nn.quantize(model, group_size=64, bits=4)
    model.eval()
    mx.eval(model.parameters())
    return model


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The best of several times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def prefill(model: Any, ids: mx.array, caches: list[Any]) -> list[Any]:
    """Take in a prompt as mlx-lm does, which computes no logits of it."""
    model(ids, cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches


def show_speed(layers: int, tokens: int, repeats: int) -> None:
    """Print the times of prefill and decode."""
    config = MICROSOFT_2B | {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 4096}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2}
    llama = stock_llama.Model(stock_llama.ModelArgs.from_dict(config | {"model_type": "llama"}))
    nn.quantize(llama, group_size=64, bits=4)  # in float32, its fastest type without a GPU
    llama.eval()
    mx.eval(llama.parameters())
    ternary_model = random_bitnet(config, None)
    kept = any(layer.keep_values for _, layer in ternary_model.ternary_layers())
    weights = sum(layer.weight.size for _, layer in ternary_model.ternary_layers())
    weights *= ternary.CODES_PER_WORD
    print(blas_status())
    print(f"{weights / 1e6:.0f} million weights in {layers} layers; unpacked ones kept: {kept}")
    ids = mx.random.randint(0, config["vocab_size"], (1, tokens))
    try:
        mx.eval(stock_bitnet.Model(stock_bitnet.ModelArgs.from_dict(config))(ids[:, :1]))
    except RuntimeError as error:
        print(f"BitNet in stock mlx-lm: {error}")
    rows = {"Llama, 4 bits, stock mlx-lm": llama, "BitNet, mlx_delta": ternary_model}
    times = {}
    for name, model in rows.items():
        caches = prefill(model, ids, [KVCache() for _ in model.layers])  # also warms it up
        step = seconds(lambda m=model, c=caches: mx.eval(m(ids[:, :1], cache=c)), 5)  # type: ignore[misc]
        times[name] = seconds(
            lambda m=model: prefill(m, ids, [KVCache() for _ in m.layers]),  # type: ignore[misc]
            repeats,
        )
        print(f"{name:28} prefill of {tokens}: {times[name]:6.2f} s, decode {step * 1e3:5.1f} ms")
    first, second = times.values()
    print(f"ratio in prefill: {first / second:.1f}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bytes", "speed"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if args.what == "bytes":
        show_bytes()
    else:
        show_speed(args.layers, args.tokens, args.repeats)


if __name__ == "__main__":
    main()
