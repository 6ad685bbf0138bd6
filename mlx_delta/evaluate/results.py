"""The results file: what was measured, kept so that an interrupted run goes on where it was."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlx_delta.measure.provenance import machine_entry
from mlx_delta.measure.results_file import VERSION, read_results
from mlx_delta.measure.settings import Setting
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.system.files import write_whole
from mlx_delta.version import VERSION as RELEASE

from .language import summarize_kld, summarize_perplexity
from .needles import summarize_needles
from .recall import summarize_recall
from .ruler import RULER, summarize_ruler
from .samples import summarize, summarize_answers

SAVE_EVERY = 3.0  # seconds
SUMMARIES: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "recall": summarize_recall,
    "perplexity": summarize_perplexity,
    "kld": summarize_kld,
    "fidelity": summarize_kld,
    "needles": summarize_needles,
    **dict.fromkeys(RULER, summarize_ruler),
    "winogrande": partial(summarize, metric="accuracy"),
    "lambada": partial(summarize, metric="accuracy"),
    "squad": summarize_answers,
}


class Results:
    """Runs of one model, in memory and in a file.

    Args:
        model: From :func:`model_entry`.
        file: Where to keep them; ``None``: in memory only.
        restart: Replace what the file holds, once there is something to write.

    Raises:
        ValueError: The file holds another model's results, or is none.
    """

    def __init__(self, model: dict[str, str], file: str | Path | None, restart: bool = False):
        self.path = None if file is None else Path(file).expanduser()
        self._saved = 0.0
        self.data: dict[str, Any] = {
            "version": VERSION,
            "mlx_delta": RELEASE,
            "model": model,
            "machine": machine_entry(),
            "runs": [],
        }
        if self.path is None:
            return
        target = Path(os.path.realpath(self.path))
        if (target.exists() and not target.is_file()) or not target.parent.is_dir():
            raise ValueError(f"[evaluate] can't write a file {str(file)!r}; give another --output.")
        if self.path.exists() and not restart:
            data = read_results(self.path)
            if data["model"]["fingerprint"] != model["fingerprint"]:
                raise ValueError(
                    f"[evaluate] {file} holds results of another model ({data['model']['name']}, "
                    f"fingerprint {data['model']['fingerprint']}; {model['name']} has "
                    f"{model['fingerprint']}); use another --output, or --restart to replace them."
                )
            self.data["runs"] = data["runs"]

    def run(
        self, task: str, setting: Setting, options: dict[str, Any], planned: int
    ) -> dict[str, Any]:
        """The run of a task and setting, begun now if there is none.

        Raises:
            ValueError: There are runs of the task with other options, or of the setting with
                another delta: they could not be compared. The message says what differs.
        """
        run: dict[str, Any] = {
            "task": task,
            "setting": setting.name,
            "kind": setting.kind,
            "options": options,
            "date": datetime.date.today().isoformat(),
            "planned": planned,
            "records": [],
            "summary": None,
        }
        if setting.delta is not None:
            run["delta"] = setting.delta.to_dict()
            if isinstance(setting.delta.sensitivities, Sensitivities):
                run["delta"]["sensitivities"] = str(setting.delta.sensitivities)
        for other in self.data["runs"]:
            if other["task"] == task:
                self._compare(f"results of {task} with", other["options"], options)
                if other["setting"] == setting.name:
                    delta = other.get("delta", {})
                    self._compare(f"{setting.name!r} with", delta, run.get("delta", {}))
                    return other
        self.data["runs"].append(run)
        return run

    def _compare(self, what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Refuse what differs; compared as JSON, where tuples are lists."""
        new = json.loads(json.dumps(new))
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"[evaluate] {self.path} holds {what} {name}={old.get(name)!r} but {name} is "
                    f"{new.get(name)!r} now; give the same options, another --output, or --restart "
                    "to replace them."
                )

    def save(self, force: bool = False) -> None:
        """Sum up and write the file in one piece, at most every few seconds unless forced."""
        if not force and time.monotonic() - self._saved < SAVE_EVERY:
            return
        for run in self.data["runs"]:
            records = run["records"]
            if records and (run["summary"] or {}).get("samples") != len(records):
                run["summary"] = SUMMARIES[run["task"]](records)
        self._saved = time.monotonic()
        if self.path is None:
            return
        # A run that has nothing yet would be noise to whoever reads the file.
        runs = [run for run in self.data["runs"] if run["summary"] or run.get("done")]
        text = json.dumps({**self.data, "runs": runs}, ensure_ascii=False)
        write_whole(self.path, f"{text}\n".encode())
