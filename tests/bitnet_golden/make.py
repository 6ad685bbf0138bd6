"""Makes ``golden.npz``: what transformers' own BitNet computes in float32 for random checkpoints.

Needs torch, transformers and accelerate, which nothing else here needs:
``TORCHDYNAMO_DISABLE=1 python -m tests.bitnet_golden.make`` (without the variable, torch compiles
the quantization, with the same results). Each case of ``checkpoints.CASES`` gives

* ``<case>/hidden``: [layers + 1, L, hidden], the input of each layer and the output of the last,
* ``<case>/logits``: [L, vocabulary],

and the bf16 case ``bf16/codes/<layer>``, the packed ternary codes of transformers' rounding.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.integrations.bitnet import WeightQuant, pack_weights

from . import checkpoints

FILE = Path(__file__).with_name("golden.npz")


def run(folder: Path) -> tuple[np.ndarray, np.ndarray, transformers.PreTrainedModel]:
    """Hidden states, logits and the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = torch.nn.Module.float(model).eval()  # ternary weights stay bfloat16 otherwise
    states: list[np.ndarray] = []

    def keep(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        states.append(inputs[0][0].numpy().copy())

    for layer in [*model.model.layers, model.model.norm]:
        layer.register_forward_pre_hook(keep, with_kwargs=False)
    with torch.no_grad():
        logits = model(torch.tensor(checkpoints.tokens()), use_cache=False).logits[0]
    return np.stack(states), logits.numpy(), model


def main() -> None:
    """Write the file."""
    found: dict[str, np.ndarray] = {}
    for case, config in checkpoints.CASES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = checkpoints.write(Path(name), config, checkpoints.tensors(config))
            found[f"{case}/hidden"], found[f"{case}/logits"], model = run(folder)
        if case == "bf16":
            for path in checkpoints.linears(config):
                weight = WeightQuant.apply(model.get_submodule(path).weight.data)
                found[f"bf16/codes/{path}"] = pack_weights(torch.sign(weight)).numpy()
    np.savez_compressed(FILE, **found)
    print(f"{FILE.name}: {FILE.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
