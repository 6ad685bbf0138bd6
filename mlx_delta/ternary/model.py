"""What ternary models share, whatever their architecture: arguments, loading, checks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.bitlinear_layers import BitLinear

from mlx_delta.ternary import codes as ternary

from .linear import ACTIVATION_BITS, TernaryLinear, on_gpu

logger = logging.getLogger("mlx_delta")

# Whether the scale divides the codes, by the checkpoint's linear_class (transformers,
# integrations/bitnet.py).
SCALE_DIVIDES = {"bitlinear": True, "autobitlinear": False}

# Without a GPU, weights of models up to this size are kept unpacked: larger ones would not fit.
KEPT_BYTES = 256 << 20


def bitnet_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a config.json if it is BitNet's own, else ``None``."""
    found = config.get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method") == "bitnet":
        return found
    return None


def is_ternary_llama(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of a Llama says that its layers are ternary.

    An entry ``activation_bits`` says so where the weights are in MLX's quantization.
    """
    return bitnet_config(config) is not None or config.get("activation_bits") is not None


def loading_overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a config.json for mlx-lm's loader.

    It would make an untied head ternary, which transformers leaves out by itself, and stumble
    over ``"modules_to_not_convert": null``, which transformers writes.
    """
    found = bitnet_config(config)
    if found is None:
        return {}
    excluded = [*(found.get("modules_to_not_convert") or []), "lm_head"]
    return {"quantization_config": {**found, "modules_to_not_convert": excluded}}


@dataclass
class TernaryArgs:
    """Arguments of a ternary model, beside those of its architecture.

    Attributes:
        quantization_config: The checkpoint's own. Its ``linear_class`` says whether scales
            multiply the codes (``autobitlinear``) or divide them (``bitlinear``, the default in
            transformers). Without one scales multiply, as in mlx-lm.
        activation_bits: 8: activations are rounded to int8 for each token, as the model was
            trained. ``None`` (null) leaves them as they are.
    """

    quantization_config: dict | None = None
    activation_bits: int | None = ACTIVATION_BITS

    def check(self) -> None:
        """Check what there is to check.

        Raises:
            ValueError: Something is not known here.
        """
        if self.activation_bits not in (ACTIVATION_BITS, None):
            raise ValueError(
                f"[load] activation_bits must be {ACTIVATION_BITS} or null in config.json but got "
                f"{self.activation_bits!r}."
            )
        found = self.quantization_config or {}
        method, linear_class = found.get("quant_method", "bitnet"), found.get("linear_class")
        if method != "bitnet":
            raise ValueError(f"[load] quant_method must be 'bitnet' but got {method!r}.")
        if linear_class not in (None, *SCALE_DIVIDES):
            raise ValueError(
                f"[load] linear_class must be one of {', '.join(SCALE_DIVIDES)} in config.json's "
                f"quantization_config but got {linear_class!r}."
            )
        if found.get("use_rms_norm"):
            raise ValueError("[load] use_rms_norm (norms inside of linears) is not supported.")

    @property
    def scale_divides(self) -> bool:
        """Whether codes are divided by their scale rather than multiplied."""
        found = bitnet_config({"quantization_config": self.quantization_config}) or {}
        default = "bitlinear" if found else "autobitlinear"
        linear_class = (self.quantization_config or {}).get("linear_class") or default
        return SCALE_DIVIDES[linear_class]


class TernaryModel(nn.Module):
    """The part of a model that knows of ternary layers; to be inherited before mlx-lm's model."""

    args: Any

    def make_ternary(self, args: Any) -> None:
        """Put ternary layers in place of the linears in all blocks, under the same names."""
        excluded = (args.quantization_config or {}).get("modules_to_not_convert") or []
        for i, layer in enumerate(self.layers):
            for part in ("self_attn", "mlp"):
                for name, module in layer[part].children().items():
                    path = f"model.layers.{i}.{part}.{name}"
                    is_linear = isinstance(module, nn.Linear | BitLinear)
                    if is_linear and not any(_names(entry, path) for entry in excluded):
                        setattr(layer[part], name, _ternary_twin(path, module, args))
        layers = [layer for _, layer in self.ternary_layers()]
        values = sum(layer.weight.size * ternary.CODES_PER_WORD for layer in layers)
        for layer in layers:
            layer.keep_values = values * mx.float32.size <= KEPT_BYTES

    def ternary_layers(self) -> Iterator[tuple[str, TernaryLinear]]:
        """The ternary layers by their paths."""
        for path, module in self.named_modules():
            if isinstance(module, TernaryLinear):
                yield path, module

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bring the ternary layers' weights, in whichever packing, into the layers' own.

        Raises:
            ValueError: A tensor is missing, or has another shape or type.
        """
        weights = dict(super().sanitize(weights))  # type: ignore[misc]
        if any(w.dtype == mx.float16 for w in weights.values()):
            wider = mx.bfloat16 if on_gpu() else mx.float32
            logger.warning("BitNet overflows float16: converted to %s.", wider)
            half = {k: w.astype(wider) for k, w in weights.items() if w.dtype == mx.float16}
            weights |= half
        for path, layer in self.ternary_layers():
            _read_layer(path, layer, weights, self.args.scale_divides)
        return weights

    def check_weights(self) -> None:
        """Read all ternary weights and check what shapes can't tell.

        Raises:
            ValueError: A tensor holds a code or a scale without meaning.
        """
        for path, layer in self.ternary_layers():
            scales = layer.scales
            if _true(ternary.has_invalid_code(layer.weight)):
                raise ValueError(
                    f"[load] tensor {path}.weight holds the ternary code 3, which has no meaning: "
                    "the file is broken or packed in another way."
                )
            if not _true(mx.all(mx.isfinite(scales))):
                raise ValueError(f"[load] the scale of tensor {path}.weight is not finite.")
            if not _true(mx.array_equal(layer.biases, -scales)):
                raise ValueError(
                    f"[load] tensor {path}.biases is not minus the scales: no ternary weights."
                )
            layer.one_scale = _true(mx.all(scales == scales[0, 0]))

    def set_dtype(self, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> None:
        """Change the type of all floating-point weights.

        Raises:
            ValueError: The type is float16, which squared ReLU and sums of int8 products overflow.
        """
        if dtype == mx.float16:
            raise ValueError("[set_dtype] BitNet overflows float16; use bfloat16 or float32.")
        super().set_dtype(dtype, *args, **kwargs)


def _true(flag: mx.array) -> bool:
    """The value of a boolean scalar."""
    return bool(flag.item())


def _names(entry: str, path: str) -> bool:
    """Whether an entry of ``modules_to_not_convert`` means the module at a path."""
    return path == entry or path.startswith(f"{entry}.") or entry in path.split(".")


def _ternary_twin(path: str, module: Any, args: TernaryArgs) -> TernaryLinear:
    """A ternary layer of the sizes of another linear layer."""
    if isinstance(module, BitLinear):
        inputs, outputs = module.in_features, module.out_features
    else:
        outputs, inputs = module.weight.shape
    has_bias = module.get("bias") is not None
    try:
        return TernaryLinear(inputs, outputs, has_bias, args.activation_bits)
    except ValueError as error:
        raise ValueError(f"[load] tensor {path}.weight: {error}") from error


def _read_layer(
    path: str, layer: TernaryLinear, weights: dict[str, mx.array], divides: bool
) -> None:
    """Replace one layer's weights by its own packing of them."""
    name = f"{path}.weight"
    if name not in weights:
        raise ValueError(f"[load] tensor {name} is missing.")
    weight, scale = weights[name], weights.pop(f"{name}_scale", None)
    outputs, inputs = layer.weight.shape[0], layer.weight.shape[1] * ternary.CODES_PER_WORD
    if f"{path}.scales" in weights:
        _read_affine(path, layer, weight, weights[f"{path}.scales"])
        return
    if weight.dtype == mx.uint8:
        if scale is None or scale.size != 1:
            raise ValueError(f"[load] tensor {name} is packed but has no {name}_scale.")
        _check_shape(name, weight, (outputs // 4, inputs))
        dtype, codes = scale.dtype, ternary.unpack_rows(weight)
        value = scale.reshape(()).astype(mx.float32)
        value = 1.0 / value if divides else value
    elif mx.issubdtype(weight.dtype, mx.floating):
        if scale is not None:
            raise ValueError(f"[load] tensor {name} is not packed but has a {name}_scale.")
        _check_shape(name, weight, (outputs, inputs))
        dtype, value = weight.dtype, ternary.absolute_mean(weight)
        codes = ternary.ternarize(weight, value)
    else:
        raise ValueError(f"[load] tensor {name} of type {weight.dtype} has no {path}.scales.")
    # On a CPU everything runs in float32, where the scale keeps its digits.
    dtype = dtype if on_gpu() else mx.float32
    scales = mx.contiguous(mx.broadcast_to(value.astype(dtype), layer.scales.shape))
    weights |= {name: ternary.pack_words(codes), f"{path}.scales": scales}
    weights[f"{path}.biases"] = -scales
    layer.one_scale = True


def _read_affine(path: str, layer: TernaryLinear, weight: mx.array, scales: mx.array) -> None:
    """Make a layer ready for weights that are in MLX's 2-bit quantization already."""
    inputs = layer.weight.shape[1] * ternary.CODES_PER_WORD
    if weight.dtype != mx.uint32:
        raise ValueError(f"[load] tensor {path}.weight must be uint32 but is {weight.dtype}.")
    _check_shape(f"{path}.weight", weight, layer.weight.shape)
    groups = [inputs // size for size in ternary.GROUP_SIZES if inputs % size == 0]
    if scales.ndim != 2 or scales.shape[1] not in groups:
        raise ValueError(
            f"[load] tensor {path}.scales has shape {scales.shape}: no group size of MLX's for "
            f"{inputs} inputs."
        )
    layer.group_size = inputs // scales.shape[1]
    layer.scales = mx.ones((weight.shape[0], scales.shape[1]))
    layer.biases = -layer.scales
    layer.one_scale = False  # unless check_weights finds it so


def _check_shape(name: str, array: mx.array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"[load] tensor {name} must have shape {expected} but has {array.shape}.")
