"""What this library uses of others beyond their documented interface, and the versions tried.

mlx-lm and lm-evaluation-harness say nothing about keeping these names, so that pyproject.toml
bounds their versions: to raise a bound, run the tests with the new version, then change it there
and here. ``tests/test_upstream.py`` checks that every name exists and that no others are used.
"""

from __future__ import annotations

# Distribution: the oldest and the newest version that the tests were run with.
TESTED = {
    "mlx": ("0.32.2", "0.32.4"),
    "mlx-lm": ("0.32.2", "0.32.2"),
    "lm-eval": ("0.4.13", "0.4.13"),
}

# Names that begin with an underscore.
PRIVATE = {
    "mlx_lm.models.cache._BaseCache": "the base class of caches, which mlx-lm asks for",
    "mlx_lm.utils._get_classes": "which file of mlx-lm's a model is in",
    "mlx_lm.utils._download": "fetches a repository as mlx_lm.load does",
    "lm_eval.tasks._factory.TaskFactory": "makes a task of data that are here already",
}

# Names without one that belong to mlx-lm's own commands and generation loop.
INTERNAL = {
    "mlx_lm.chat.setup_arg_parser": "mlx_lm.chat's flags",
    "mlx_lm.generate.generate_step": "the loop that benchmarks time",
    "mlx_lm.generate.generation_stream": "what it runs on",
    "mlx_lm.generate.setup_arg_parser": "mlx_lm.generate's flags",
    "mlx_lm.generate.wired_limit": "the memory that it keeps wired",
    "mlx_lm.models.base.create_causal_mask": "masks of windows and batches",
    "mlx_lm.models.base.scaled_dot_product_attention": "what models attend with",
    "mlx_lm.models.bitlinear_layers.BitLinear": "the layer that ternary ones stand in for",
    "mlx_lm.models.pipeline.PipelineMixin": "which layers a process of several has",
    "mlx_lm.utils.MODEL_REMAPPING": "other names of model types",
}
