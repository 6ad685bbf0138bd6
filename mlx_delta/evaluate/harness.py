"""EleutherAI's lm-evaluation-harness: its tasks, under any way to keep keys and values.

The paper's tasks (``winogrande``, ``squadv2``), long-context ones (RULER, LongBench) and all the
others. lm-evaluation-harness is an optional dependency, and slow to import: only what runs a task
imports it.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_delta.measure.settings import Setting
from mlx_delta.models.anatomy import context_length

from .harness_squad import question_scores, squad_v2

SQUAD = "squadv2"
RULER_LENGTH = 4096  # tokens of RULER's texts if not told, or the model's context if that is less

# What is handed on of the harness's results.
_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "config",
    "lm_eval_version",
)


@dataclass(frozen=True)
class HarnessOptions:
    """How a task is run.

    Attributes:
        limit: Examples of each task; ``None``: all.
        num_shots: Worked examples before each question; ``None``: as the task says.
        data_dir: Local data (see ``harness_files.py``), and YAML files of further tasks.
        batch_size: Requests that may run together. The answers do not depend on it.
        max_gen_toks: Tokens to generate at most; ``None``: as the task says.
        apply_chat_template: Put requests into the model's chat template. The paper does not.
        seed: Of worked examples, of RULER's texts and of requests that ask for sampling.
        max_seq_lengths: Tokens of RULER's texts.

    Raises:
        ValueError: A value is out of range; the message names it.
    """

    limit: int | None = None
    num_shots: int | None = None
    data_dir: Path | None = None
    batch_size: int = 1
    max_gen_toks: int | None = None
    apply_chat_template: bool = False
    seed: int = 0
    max_seq_lengths: list[int] | None = None

    def __post_init__(self) -> None:
        """Check every value once."""
        for name, least in (("limit", 1), ("num_shots", 0), ("batch_size", 1), ("max_gen_toks", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"[HarnessOptions] {name} must be >= {least} but got {value}.")
        if self.max_seq_lengths is not None and min(self.max_seq_lengths, default=0) < 1:
            raise ValueError(
                "[HarnessOptions] max_seq_lengths must be positive numbers but got "
                f"{self.max_seq_lengths}."
            )
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise ValueError(f"[HarnessOptions] data_dir {str(self.data_dir)!r} is no directory.")


def harness_tasks(data_dir: Path | None = None) -> list[str]:
    """Names of the harness's tasks, groups and tags, and of those in ``data_dir``."""
    from .harness_data import task_names

    return task_names(data_dir)


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    setting: Setting,
    task: str,
    options: HarnessOptions,
    done: dict[str, Any],
    save: Callable[[], None],
) -> dict[str, Any]:
    """Run one task under one setting.

    Args:
        model: The model.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        setting: How keys and values are kept.
        task: A task, group or tag of the harness, or one of ``options.data_dir``.
        options: How it is run.
        done: Belongs to this task and setting; finished requests' answers go there, so that a run
            that was interrupted goes on where it was. JSON-able.
        save: Called after every batch.

    Returns:
        The harness's results in its own format, and under ``summary`` the task's main metric
        (``score``, and ``low`` and ``high``, 1.96 standard errors away, or ``None`` where there is
        none), with the means over requests of sparsities and of the cache's bytes.

    Raises:
        ValueError: The task is unknown, or does not go together with the options or the model.
        FileNotFoundError: The task's data are neither local nor could they be fetched.
    """
    if options.apply_chat_template and not getattr(tokenizer, "has_chat_template", False):
        raise ValueError(
            "[evaluate] the model's tokenizer has no chat template; drop --apply-chat-template."
        )
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    from .harness_data import load_tasks
    from .harness_model import HarnessModel, average_cost

    context = context_length(model) or RULER_LENGTH
    metadata = {
        "tokenizer": tokenizer.name_or_path,
        "max_seq_lengths": options.max_seq_lengths or [min(RULER_LENGTH, context)],
    }
    with _quiet():
        manager, tasks = load_tasks(task, options.data_dir, metadata, options.num_shots)
    with _quiet(), _local_squad_metric():
        answering = HarnessModel(
            model,
            tokenizer,
            setting,
            task,
            options.batch_size,
            options.max_gen_toks,
            options.seed,
            done,
            save,
        )
        results = lm_eval.simple_evaluate(
            answering,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_shots,
            batch_size=options.batch_size,
            limit=options.limit,
            bootstrap_iters=1000,
            apply_chat_template=options.apply_chat_template,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
            metadata=metadata,
        )
    cost = average_cost(answering.costs.values())
    summary = {
        **summarize(task, results),
        **{f"{name}_sparsity": cost[name] for name in ("prefill", "decode", "overall")},
        "cache_bytes": round(cost["bytes"] or 0),
    }
    kept = {name: results[name] for name in _KEPT if name in results}
    plain = json.loads(json.dumps(kept, default=handle_non_serializable))
    return {**_finite(plain), "summary": summary}


def summarize(task: str, results: dict[str, Any]) -> dict[str, Any]:
    """A task's main metric: F1 for SQuAD v2, else the first that its configuration lists.

    Of RULER's metrics, one for each length of text, those that were measured; they are averaged, as
    are the tasks of a group that does not say how to sum them up.
    """
    leaves = [_main_metric(name, results) for name in sorted(results["configs"])]
    names = {leaf["metric"] for leaf in leaves}
    errors = [leaf["stderr"] for leaf in leaves]
    score = statistics.fmean(leaf["score"] for leaf in leaves)
    stderr = None
    if all(error is not None for error in errors):
        stderr = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    metric = names.pop() if len(names) == 1 else "mean"
    group = results.get("groups", {}).get(task, {})
    for key, value in group.items():
        if key.partition(",")[0] == metric and _is_number(value):
            score, stderr = value, _number(group.get(key.replace(",", "_stderr,", 1)))
    return {
        "metric": metric,
        "higher_is_better": leaves[0]["higher_is_better"],
        "score": score,
        "low": None if stderr is None else score - 1.96 * stderr,
        "high": None if stderr is None else score + 1.96 * stderr,
        "samples": sum(results["n-samples"][name]["effective"] for name in results["configs"]),
        "metrics": {
            key.removesuffix(",none"): value
            for key, value in results["results"].get(task, {}).items()
            if "," in key and _is_number(value)
        },
    }


def _main_metric(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """A single task's main metric, with its standard error where there is one."""
    found = {
        key: value
        for key, value in results["results"][name].items()
        if "," in key and "_stderr," not in key and _is_number(value)
    }
    listed = [str(entry["metric"]) for entry in results["configs"][name].get("metric_list") or []]
    order = {metric: i for i, metric in enumerate(["f1"] if name == SQUAD else listed)}
    keys = sorted(found, key=lambda key: order.get(key.partition(",")[0], len(order)))
    if all(key.partition(",")[0].isdecimal() for key in keys):  # RULER's lengths
        keys = [key for key in keys if found[key] != -1] or keys
    else:
        keys = keys[:1]
    score = statistics.fmean(found[key] for key in keys)
    metric = keys[0].partition(",")[0] if len(keys) == 1 else "mean"
    stderr = _number(results["results"][name].get(keys[0].replace(",", "_stderr,", 1)))
    if stderr is None:
        stderr = _sample_error(metric, score, results["samples"][name])
    better = results["higher_is_better"].get(name, {}).get(metric)
    return {
        "metric": metric,
        "score": score,
        "stderr": stderr,
        "higher_is_better": True if better is None else better,
    }


def _sample_error(metric: str, score: float, samples: list[dict[str, Any]]) -> float | None:
    """The standard error of a score that is a mean over questions, where the harness gives none."""
    values = [sample[metric] for sample in samples if metric in sample]
    if values and isinstance(values[0], tuple) and metric in ("exact", "f1"):
        predictions, references = zip(*values, strict=True)
        values = [100 * value for value in question_scores(predictions, references)[metric]]
    values = [value for value in values if _is_number(value) and value != -1]
    if len(values) < 2 or not math.isclose(statistics.fmean(values), score, rel_tol=1e-9):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    """A number, or nothing: the harness writes "N/A"."""
    return float(value) if _is_number(value) else None


def _finite(value: Any) -> Any:
    """The same without what JSON can't hold: infinities and NaN become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's advice on its own command line to itself, and standard output free."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _local_squad_metric() -> Iterator[None]:
    """SQuAD v2's metric without fetching and running a script from the hub."""
    module = sys.modules.get("lm_eval.tasks.squadv2.task")  # there once the task is loaded
    if module is None:
        yield
        return
    original = module._squad_metric  # type: ignore[attr-defined]
    module._squad_metric = squad_v2  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module._squad_metric = original  # type: ignore[attr-defined]
