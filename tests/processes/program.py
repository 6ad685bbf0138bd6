"""What the tests launch in several processes: each case's tokens and caches, as JSON lines.

    mlx.launch --backend ring -n 4 python tests/processes/program.py "demo layers -" [CASE ...]

A case is ``model sharing setting``, where sharing is ``heads``, ``layers`` or ``none``. The first
process prints a line for each case: the tokens, and each process's bytes and layers of cache.
"""

from __future__ import annotations

import json
import sys

import mlx_delta
from mlx_delta.config import DeltaConfig
from mlx_delta.generate import make_caches
from mlx_delta.generate.processes import Processes

import mlx.core as mx  # isort: skip  (after mlx_delta: it chooses the BLAS)
from mlx.utils import tree_flatten  # isort: skip

TEXT = "It was a dark night, and the wind was in the trees. The password of Anna is blue. " * 3
TOKENS = 16


def run(case: str, processes: Processes) -> dict:
    model_name, sharing, setting = case.split()
    group = mx.distributed.init()
    groups = {"heads": {"tensor_group": group}, "layers": {"pipeline_group": group}, "none": {}}
    model, tokenizer = mlx_delta.load(model_name, **groups[sharing])
    if setting != "-":
        model.args.delta = DeltaConfig.parse(setting, model.args.delta)
    prompt = tokenizer.encode(TEXT)
    caches = make_caches(model, len(prompt))
    for start in range(0, len(prompt) - 1, 100):
        model(mx.array([prompt[start : min(start + 100, len(prompt) - 1)]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    # The demo goes on as it likes. A random model has ties, which fall as sums are rounded: it is
    # given what comes next, so that one of them does not change all that follows.
    token, tokens, clear = prompt[-1], [], []
    for i in range(TOKENS):
        logits = model(mx.array([[token]]), cache=caches)[0, -1]
        low, high = mx.sort(logits)[-2:].tolist()
        tokens.append(int(mx.argmax(logits)))
        clear.append(high - low > 0.1)
        token = tokens[-1] if model_name == "demo" else 37 * i
    return {
        "tokens": tokens,
        "clear": clear,
        "bytes": processes.of_each(sum(cache.nbytes for cache in caches)),
        "layers": processes.of_each(len(caches)),
        "kept": processes.of_each(sum(x.nbytes for _, x in tree_flatten(model.parameters()))),
        "same": len(set(processes.of_each(hash(tuple(tokens)) >> 2))) == 1,
    }


def main() -> None:
    processes = Processes()
    for case in sys.argv[1:]:
        found = run(case, processes)
        if processes.first:
            print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main()
