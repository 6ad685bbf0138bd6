"""Carrying tasks out: what is missing is measured, each sample is kept as soon as it is there."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from tqdm import tqdm

from mlx_delta.measure.settings import Setting
from mlx_delta.measure.text import context_length, read_text
from mlx_delta.wording import nearest

from .language import LanguageOptions, make_windows, measure_window
from .local_tasks import FILE_TASKS
from .recall import RecallOptions, RecallTask, measure_sample
from .results import Results
from .ruler import RULER
from .samples import CHECK_EVERY, SampleTask, copied

LANGUAGE = ("perplexity", "kld", "fidelity")
COMPARED = ("kld", "fidelity")  # with the same model's dense cache
TASKS = ("recall", *LANGUAGE, "needles", *RULER)

EXTRA = "pip install 'mlx_delta[evaluate]'"


def check_tasks(names: Sequence[str], data_dir: Path | None = None) -> None:
    """Refuse tasks that nobody knows, before a model is loaded.

    Raises:
        ValueError: A task is unknown, or given twice; or it needs lm-evaluation-harness, which is
            not installed.
        FileNotFoundError: A task's file is not there.
    """
    for i, name in enumerate(names):
        if name.partition("=")[0] in [other.partition("=")[0] for other in names[:i]]:
            raise ValueError(f"[evaluate] task {name!r} is given twice; drop one.")
        kind, equals, file = name.partition("=")
        if equals and kind not in FILE_TASKS:
            raise ValueError(
                f"[evaluate] task {kind!r} takes no file{nearest(kind, FILE_TASKS)}; those that do "
                f"are {', '.join(FILE_TASKS)}."
            )
        if equals and not Path(file).expanduser().is_file():
            raise FileNotFoundError(f"[evaluate] {name!r}: there is no file {file!r}.")
    others = [name for name in names if name not in TASKS and "=" not in name]
    if not others:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"[evaluate] unknown task {others[0]!r}{nearest(others[0], TASKS)}; known are "
            f"{', '.join(TASKS)}, {'=FILE, '.join(FILE_TASKS)}=FILE, and those of "
            f"lm-evaluation-harness once it is installed: {EXTRA}."
        )
    from .harness import harness_tasks

    known = [*TASKS, *harness_tasks(data_dir)]
    for name in others:
        if name not in known:
            raise ValueError(
                f"[evaluate] unknown task {name!r}{nearest(name, known)}; known are "
                f"{', '.join(TASKS)}, {'=FILE, '.join(FILE_TASKS)}=FILE, and those of "
                "lm-evaluation-harness."
            )


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, its file's name, and what says in results which text it was."""

    name: str
    content: str

    @classmethod
    def read(cls, file: Path) -> Text:
        """From a file; see :func:`read_text`."""
        return cls(file.name, read_text(file))

    def entry(self) -> dict[str, str]:
        """For a run's options."""
        digest = hashlib.sha256(self.content.encode()).hexdigest()[:16]
        return {"text": self.name, "text_hash": digest}


Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """A model, the settings to compare on it, and where the results go.

    Each method checks a task and returns what measures it, so that nothing is refused after hours
    of measuring something else.
    """

    model: nn.Module
    tokenizer: Any
    settings: Sequence[Setting]
    results: Results

    def recall(self, options: RecallOptions, text: Text) -> Step:
        """The recall samples that settings lack."""
        task = RecallTask(self.tokenizer, text.content, options, context_length(self.model))
        entry = {
            "seed": options.seed,
            "answers": options.answers,
            "distances": list(task.distances),
            "templates": list(options.templates),
            "length": task.length,
            "facts": task.facts,
            **text.entry(),
        }
        samples = task.samples
        runs = self._runs("recall", entry, len(samples))

        def measure() -> None:
            for setting, run in zip(self.settings, runs, strict=True):
                done = {(record["template"], record["index"]) for record in run["records"]}
                missing = [sample for sample in samples if sample not in done]
                for sample in tqdm(missing, desc=f"recall, {setting.name}", disable=not missing):
                    run["records"].append(measure_sample(self.model, setting, task, *sample))
                    self.results.save()

        return measure

    def language(self, tasks: Sequence[str], options: LanguageOptions, text: Text) -> Step:
        """The windows that settings lack for tasks of ``LANGUAGE``; several at once."""
        windows = make_windows(self.tokenizer, text.content, options, context_length(self.model))
        entry = {"length": len(windows[0]) - 1, "windows": len(windows), **text.entry()}
        runs = {task: self._runs(task, entry, len(windows)) for task in tasks}

        def measure() -> None:
            todo = [i for i in range(len(windows)) if any(_lacking(r, i) for r in runs.values())]
            for i in tqdm(todo, desc=" and ".join(tasks), disable=not todo):
                lacking = {task: _lacking(runs[task], i) for task in tasks}
                needed = sorted(set().union(*lacking.values()))
                records = measure_window(
                    self.model,
                    self.tokenizer,
                    windows[i],
                    [self.settings[n] for n in needed],
                    any(lacking.get(task) for task in COMPARED),
                )
                for n, record in zip(needed, records, strict=True):
                    for task in tasks:
                        if n in lacking[task]:
                            runs[task][n]["records"].append({"index": i, **record})
                self.results.save()

        return measure

    def samples(self, task: SampleTask) -> Step:
        """The samples that settings lack; see :class:`SampleTask`.

        A setting that is dense up to some length takes dense attention's records of shorter
        samples; one in so many is measured all the same, and all are should those differ.
        """
        runs = self._runs(task.name, task.options, sum(map(len, task.groups)))

        def measure() -> None:
            lacking = [_not_done(run, task) for run in runs]
            count = sum(map(len, lacking))
            with tqdm(total=count, desc=task.name, disable=not count) as bar:
                # All settings of a group before the next: what is there can be compared.
                for group in task.groups:
                    for setting, run, missing in zip(self.settings, runs, lacking, strict=True):
                        part = [i for i in group if i in missing]
                        self._measure_group(task, setting, run, part, copying=True)
                        bar.update(len(part))
            for setting, run in zip(self.settings, runs, strict=True):
                self._check_copies(task, setting, run)

        return measure

    def _measure_group(
        self,
        task: SampleTask,
        setting: Setting,
        run: dict[str, Any],
        part: list[int],
        copying: bool,
    ) -> None:
        """Samples of a group that a setting lacks."""
        dense = {} if setting.kind == "dense" else self._dense_records(task.name)
        short = {i for i in part if i in dense and task.tokens(i) <= setting.dense_up_to}
        taken = [i for i in part if copying and i in short and i % CHECK_EVERY]
        run["records"] += [copied(dense[i]) for i in taken]
        part = [i for i in part if i not in taken]
        if part:
            run["records"] += task.measure(self.model, setting, part)
        self.results.save()

    def _check_copies(self, task: SampleTask, setting: Setting, run: dict[str, Any]) -> None:
        """Compare what was measured with what would have been taken over."""
        if not any(record.get("as_dense") for record in run["records"]):
            return
        dense = self._dense_records(task.name)
        measured = [
            record
            for record in run["records"]
            if not record.get("as_dense") and task.tokens(record["index"]) <= setting.dense_up_to
        ]
        differing = [r for r in measured if r["score"] != dense[r["index"]]["score"]]
        run["checked"] = {"samples": len(measured), "differing": len(differing)}
        if differing:
            run["records"] = [r for r in run["records"] if not r.get("as_dense")]
            missing = _not_done(run, task)
            for group in task.groups:
                part = [i for i in group if i in missing]
                self._measure_group(task, setting, run, part, copying=False)

    def _dense_records(self, task: str) -> dict[int, Any]:
        """Dense attention's records of a task, by number."""
        runs = [r for r in self.results.data["runs"] if (r["task"], r["kind"]) == (task, "dense")]
        return {record["index"]: record for run in runs for record in run["records"]}

    def harness(self, task: str, options: Any) -> Step:
        """One of lm-evaluation-harness's tasks, with the settings that lack it."""
        from .harness import run_harness

        entry = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(options).items()
            if name != "batch_size"  # answers don't depend on it
        }
        runs = self._runs(task, entry, 0)

        def measure() -> None:
            for setting, run in zip(self.settings, runs, strict=True):
                if run["summary"] is not None:
                    continue
                done = run.setdefault("done", {})
                found = run_harness(
                    self.model, self.tokenizer, setting, task, options, done, self.results.save
                )
                summary = found.pop("summary")
                run["summary"] = {"higher_is_better": True, "samples": 0, "metrics": {}} | summary
                run["harness"] = found
                del run["done"]  # the answers have served
                self.results.save(force=True)

        return measure

    def _runs(self, task: str, options: dict[str, Any], planned: int) -> list[dict[str, Any]]:
        """A task's runs, one for each setting."""
        return [self.results.run(task, setting, options, planned) for setting in self.settings]


def _lacking(runs: Sequence[dict[str, Any]], index: int) -> set[int]:
    """Which of a task's runs lack a window."""
    return {
        n
        for n, run in enumerate(runs)
        if all(record["index"] != index for record in run["records"])
    }


def _not_done(run: dict[str, Any], task: SampleTask) -> set[int]:
    """Samples of a task that a run lacks."""
    done = {record["index"] for record in run["records"]}
    return {i for group in task.groups for i in group if i not in done}
