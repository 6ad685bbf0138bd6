"""Compute the logits that the tests compare with, by transformers; needs torch, which CI lacks.

    python -m tests.convert.make_golden

writes golden.npz beside this file. Weights are made by ``checkpoints``, so nothing else is kept.
BitNet is computed twice: with its ternary weights alone, as MLX's models compute it, and with
its activations rounded to 8 bits too, as it was trained.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import ActQuant

from . import checkpoints

FILE = Path(__file__).with_name("golden.npz")
TOKENS = [list(range(3, 43)), [(7 * i * i + 5) % 384 for i in range(40)]]
CASES: dict[str, dict[str, Any]] = {
    "llama": checkpoints.LLAMA,
    "llama3": checkpoints.LLAMA3,
    "llama_linear": checkpoints.LLAMA
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "mlp_bias": False},
    "bitnet": checkpoints.BITNET,
    "ternary_llama": checkpoints.TERNARY_LLAMA,
}


def main() -> None:
    """Write the file."""
    found = {}
    for name, config in CASES.items():
        values = {
            key: value for key, value in config.items() if key not in ("quantization_config",)
        }
        bitnet = config["model_type"] == "bitnet"
        kind = (BitNetConfig, BitNetForCausalLM) if bitnet else (LlamaConfig, LlamaForCausalLM)
        model = kind[1](kind[0](**values)).float().eval()
        state = {}
        for key, array in checkpoints.weights(config).items():
            if "quantization_config" in config and checkpoints.is_linear(key):
                codes, scale = checkpoints.ternary(array)
                # The packed checkpoint keeps its scale in bfloat16.
                divides = "linear_class" not in config["quantization_config"]
                stored = torch.tensor(1 / scale if divides else scale).bfloat16().float()
                array = codes * (1 / stored if divides else stored).numpy()
            state[key] = torch.tensor(array)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        with torch.no_grad():
            found[name] = model(torch.tensor(TOKENS)).logits[:, -8:].numpy()
            if "quantization_config" in config:
                for module in model.model.layers.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.register_forward_pre_hook(
                            lambda _, inputs: (ActQuant.apply(inputs[0]),)
                        )
                found[name + "_a8"] = model(torch.tensor(TOKENS)).logits[:, -8:].numpy()
    np.savez_compressed(FILE, tokens=np.array(TOKENS), **found)


if __name__ == "__main__":
    main()
