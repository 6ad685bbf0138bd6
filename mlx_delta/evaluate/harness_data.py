"""The harness's tasks: which there are, and loading them with their data, local or from the hub.

The one place that reaches behind lm-evaluation-harness's public interface: its task factory, in
which a task meets its data.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import huggingface_hub.constants
import jinja2.meta
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from mlx_delta.wording import nearest

from .harness_files import Splits, find_files

# A key of a task file at the start of its line: what follows it, or the list in the lines below.
_NAMES = re.compile(
    r"^(task|group|tag):[ \t]*([^\s#]*)[^\n]*$((?:\n[ \t]*-[ \t]*[^\s#]+[ \t]*$)*)", re.MULTILINE
)


@functools.cache
def bundled_tasks() -> tuple[dict[str, Path], frozenset[str]]:
    """The harness's own tasks with their files, and its groups and tags.

    Read from the lines that name them: parsing its fourteen thousand files takes ten times as
    long, and only groups and tags need it.
    """
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return _scan(Path(spec.origin).parent / "tasks")


def _scan(root: Path) -> tuple[dict[str, Path], frozenset[str]]:
    tasks: dict[str, Path] = {}
    collections: set[str] = set()
    for path in sorted(root.glob("**/*.yaml")):
        found: dict[str, list[str]] = {"task": [], "group": [], "tag": []}
        for key, value, items in _NAMES.findall(path.read_text(encoding="utf-8")):
            listed = [] if key == "task" else [line.strip(" \t-\"'") for line in items.split("\n")]
            found[key] += [name for name in (value.strip("\"'"), *listed) if name]
        collections.update(found["group"], found["tag"])
        if not found["group"]:
            for name in found["task"]:
                tasks.setdefault(name, path)
    return tasks, frozenset(collections)


def task_names(data_dir: Path | None) -> list[str]:
    """Names of the harness's tasks, groups and tags, and of those whose YAML is in ``data_dir``."""
    tasks, collections = bundled_tasks()
    names = {*tasks, *collections}
    if data_dir is not None:
        own, others = _scan(data_dir)
        names |= {*own, *others}
    return sorted(names)


def load_tasks(
    name: str, data_dir: Path | None, metadata: dict[str, Any], num_shots: int | None
) -> tuple[TaskManager, list[Any]]:
    """Load a task, or those of a group or tag, with their data.

    Args:
        name: The task.
        data_dir: Where local data, and YAML files of further tasks, may be.
        metadata: What RULER's tasks need in order to make their texts.
        num_shots: Worked examples before each question; ``None``: as the task says.

    Returns:
        The task manager, and what to hand to the harness.

    Raises:
        ValueError: There is no such task, or local data do not fit it.
        FileNotFoundError: The data are neither local nor could they be fetched.
    """
    tasks, collections = bundled_tasks()
    own = _scan(data_dir) if data_dir is not None else ({}, frozenset())
    spec: str = name
    if name in own[0] or name in own[1]:
        defaults = name not in own[0]
    elif name in tasks:
        spec, defaults = str(tasks[name]), False
    elif name in collections:
        defaults = True
    else:
        near = nearest(name, task_names(data_dir))
        raise ValueError(f"[evaluate] lm-evaluation-harness has no task {name!r}{near}.")
    manager = copy.copy(_manager(data_dir, defaults))
    manager._factory = _Factory(metadata, data_dir, num_shots)
    # Some tasks print while they make their texts, and standard output is for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            loaded = manager.load([spec])
        except KeyError as error:  # the harness passes over files that it can't parse
            raise ValueError(
                f"[evaluate] task {name!r} can't be loaded; is its YAML file in {data_dir} valid?"
            ) from error
    return manager, [*loaded["groups"].values()] or [*loaded["tasks"].values()]


@functools.cache
def _manager(data_dir: Path | None, defaults: bool) -> TaskManager:
    return TaskManager(include_path=data_dir and str(data_dir), include_defaults=defaults)


class _Factory(TaskFactory):
    """Builds tasks, with local data where there are any.

    Args:
        metadata: As for :func:`load_tasks`.
        data_dir: As for :func:`load_tasks`.
        num_shots: As for :func:`load_tasks`.
    """

    def __init__(self, metadata: dict[str, Any], data_dir: Path | None, num_shots: int | None):
        super().__init__(meta=metadata)
        self._data_dir, self._num_shots = data_dir, num_shots

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        try:
            config = self._load_full_config(entry, overrides)
        except ImportError as error:
            raise ValueError(
                f"[evaluate] task {entry.name!r} needs a package that is not installed: "
                f"{_reason(error)}; pip install 'mlx_delta[evaluate]' has those of RULER and "
                "LongBench."
            ) from error
        files = find_files(entry.name, self._data_dir)
        if self._data_dir is not None and files:
            return self._build_local(entry, overrides, config, self._data_dir, files)
        with _offline_unless_reachable() as offline:
            try:
                return super()._build_task(entry, overrides)
            except Exception as error:  # datasets and the hub's client share no base class
                reason = "the hub can't be reached" if offline else _reason(error)
                if callable(config.get("custom_dataset")):
                    reason = f"{type(error).__name__} {_reason(error)}"
                raise _unavailable(entry.name, config, self._data_dir, reason) from error

    def _build_local(
        self,
        entry: Any,
        overrides: dict[str, Any] | None,
        config: dict[str, Any],
        data_dir: Path,
        files: dict[str, list[Path]],
    ) -> Any:
        splits = Splits(entry.name, data_dir, files, config)
        local = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: [str(file) for file in files[split]] for split in files}
            },
            "custom_dataset": None,
        }
        try:
            with _serve(splits):
                task = super()._build_task(entry, {**(overrides or {}), **local})
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever a task's own functions raise
            raise ValueError(
                f"[evaluate] the data of {entry.name!r} in {data_dir} do not fit the task: "
                f"{type(error).__name__} {_reason(error)}. They have the columns "
                f"{', '.join(splits.columns)}; it reads {', '.join(expected_columns(config))}."
            ) from error
        shots = task.config.num_fewshot if self._num_shots is None else self._num_shots
        if shots and splits.borrowed is not None:
            raise FileNotFoundError(
                f"[evaluate] worked examples of {entry.name!r} come from its split "
                f"{splits.borrowed!r}; put {splits.borrowed}.jsonl into {data_dir / entry.name}."
            )
        return task


@contextlib.contextmanager
def _serve(splits: Splits) -> Iterator[None]:
    """Have the task that is being built find its data here, and look for them nowhere else."""
    original = datasets.load_dataset
    datasets.load_dataset = lambda *args, **kwargs: splits
    try:
        yield
    finally:
        datasets.load_dataset = original


@contextlib.contextmanager
def _offline_unless_reachable() -> Iterator[bool]:
    """Let the hub's client use what it has cached only, if nobody answers.

    By itself it tries again for half a minute for each file. Yields whether it is offline.
    """
    modules: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    offline = any(before) or not _reachable(huggingface_hub.constants.ENDPOINT)
    for module in modules:
        module.HF_HUB_OFFLINE = offline
    try:
        yield offline
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _reachable(url: str) -> bool:
    """Whether a server answers; taken for granted behind a proxy."""
    parts = urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return True
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError:
        return False
    return True


def _unavailable(
    name: str, config: dict[str, Any], data_dir: Path | None, reason: str
) -> FileNotFoundError:
    """What to put where, for a task whose data could not be fetched."""
    if callable(config.get("custom_dataset")):
        return FileNotFoundError(
            f"[evaluate] the texts of {name!r}, which the task makes itself, could not be made: "
            f"{reason}."
        )
    source = config.get("dataset_path") or getattr(config.get("class"), "DATASET_PATH", None)
    subset = config.get("dataset_name")
    split = config.get("test_split") or config.get("validation_split") or "validation"
    place = data_dir if data_dir is not None else "DIR"
    return FileNotFoundError(
        f"[evaluate] the data of {name!r} ({source}{f', {subset}' if subset else ''} on the hub) "
        f"could not be fetched: {reason}. Put {place}/{name}/{split}.jsonl there, with one "
        f"JSON object per line that has {', '.join(expected_columns(config))}"
        + (
            f" (and {config.get('training_split') or 'train'}.jsonl for --num-shots)"
            if config.get("training_split") or "class" in config
            else ""
        )
        + ("." if data_dir is not None else ", and give --data-dir DIR.")
    )


def expected_columns(config: dict[str, Any]) -> list[str]:
    """The columns that a task reads, as far as its templates and functions show them."""
    columns: dict[str, None] = {}
    for key in ("class", "process_docs", "doc_to_text", "doc_to_target", "doc_to_choice"):
        value = config.get(key)
        if isinstance(value, str) and "{{" in value:
            parsed = jinja2.Environment(autoescape=False).parse(value)
            columns |= dict.fromkeys(sorted(jinja2.meta.find_undeclared_variables(parsed)))
        elif isinstance(value, str) and value.isidentifier():
            columns[value] = None
        elif callable(value):
            source = inspect.getsource(value)
            columns |= dict.fromkeys(re.findall(r"""\bdoc\[["'](\w+)["']\]""", source))
    return list(columns) or ["the dataset's own columns"]


def _reason(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
