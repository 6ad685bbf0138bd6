"""Everything on docs/results.md, and the table of README.md: measured, drawn and written.

    python docs/make_results.py --data DIR            # hours on two cores; goes on where it was
    python docs/make_results.py --only smollm2        # one model's runs
    python docs/make_results.py --page                # measures nothing

Each run is one ``python -m mlx_delta.evaluate`` that keeps its records in docs/results/NAME.json,
so that an interrupted one goes on; the commands are on the page too. DIR has the files that can't
come with the project: winogrande.jsonl, lambada.jsonl, squad.json, and prose.txt.xz for the chunks
of the public tools (WikiText, or books). What lacks its file is left out, and said.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

import results_page  # noqa: E402  (beside this file)

OTHERS = ("kv8", "kv4", "kv4-rotated", "kivi4", "kivi2")
PAPER = ("paper", "paper:threshold=1.05")
DELTA = ("delta", "delta:sparsity=0.8", "uncalibrated")
# SmolLM2 with three quarters of the deltas zero, by its own window and by the default's.
MORE, NARROW = "delta:level=0.0008442", "delta:window=64,level=0.0008442"
STORES = (
    "delta:kv=balanced", "delta:kv=small", "delta:sparsity=0.75,key_bits=3.5,value_bits=2.75",
    "delta:sparsity=0.75,key_bits=3,value_bits=2.5",
    "delta:sparsity=0.8,key_bits=3,value_bits=2.25",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One results file.

    Attributes:
        name: Of the file.
        model: As ``--model`` takes it.
        tasks: As ``--tasks`` takes them; ``DATA/`` stands for the folder of data.
        settings: As ``--settings`` takes them, dense first.
        flags: Further flags.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    settings: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def command(self, data: str) -> list[str]:
        """What is run, after ``python``."""
        words = ["-m", "mlx_delta.evaluate", "--model", self.model, "--tasks", *self.tasks]
        words += [*self.flags, "--settings", *self.settings]
        words += ["--output", f"docs/results/{self.name}.json"]
        return [word.replace("DATA/", f"{data}/") for word in words]


# The most telling first: whoever stops it has those.
RUNS = (
    Run(
        "smollm2-kld-2048", "smollm2", ("kld",),
        ("dense", *DELTA, MORE, NARROW, *STORES, *PAPER, "window-only", *OTHERS),
        ("--length", "2048", "--windows", "4"),
    ),
    Run(
        "smollm2-winogrande", "smollm2", ("winogrande=DATA/winogrande.jsonl",),
        ("dense", "delta", *PAPER), ("--batch-size", "16"),
    ),
    Run(
        "smollm2-lambada", "smollm2", ("lambada=DATA/lambada.jsonl",),
        ("dense", "delta", *PAPER), ("--limit", "1000", "--batch-size", "16"),
    ),
    Run(
        "smollm2-squad", "smollm2", ("squad=DATA/squad.json",),
        ("dense", "delta", NARROW), ("--limit", "2992", "--batch-size", "32"),
    ),
    Run(
        "smollm2-squad-500", "smollm2", ("squad=DATA/squad.json",),
        ("dense", "delta", "delta:kv=balanced", *PAPER), ("--limit", "500", "--batch-size", "16"),
    ),
    Run(
        "smollm2-needles", "smollm2", ("needles",),
        (
            *("dense", "delta", NARROW, "delta:window=64,kv=balanced"),
            "delta:window=64,prefill=tiles,level=0",
            *("uncalibrated", *PAPER, "kv8", "kv4"),
        ),
        ("--needles", "word", "--samples", "5"),
    ),
    Run(
        "smollm2-needles-1k", "smollm2", ("needles",),
        ("dense", "delta", NARROW, "delta:kv=balanced", "delta:kv=small", "kv8"),
        ("--needles", "word", "--lengths", "1024", "--samples", "24"),
    ),
    Run(
        "smollm2-needles-paper", "smollm2", ("needles",), ("dense", "delta", *PAPER),
        ("--needles", "word", "--lengths", "1024", "--samples", "6"),
    ),
    Run(
        "smollm2-kld-4096", "smollm2", ("kld",),
        ("dense", *DELTA, MORE, NARROW, *STORES, *PAPER, "window-only", *OTHERS),
        ("--length", "4096", "--windows", "2"),
    ),
    Run(
        "smollm2-fidelity", "smollm2", ("fidelity",),
        ("dense", "delta", "paper", *OTHERS),
        ("--windows", "10", "--text", "DATA/prose.txt.xz"),
    ),
    Run(
        "demo-recall", "demo", ("recall",), ("dense", *DELTA, *PAPER),
        ("--length", "16384", "--distances", "2000", "8000", "16000", "--answers", "2"),
    ),
    Run(
        "demo-needles", "demo", ("needles",), ("dense", "delta", "uncalibrated", *PAPER),
        ("--needles", "password", "--lengths", "2048", "8192", "16384", "--samples", "1"),
    ),
    Run(
        "demo-kld", "demo", ("kld",),
        ("dense", *DELTA, *STORES, *PAPER, "window-only", *OTHERS), ("--windows", "4"),
    ),
    Run(
        "demo-bitnet", "demo-bitnet", ("recall", "kld"),
        ("dense", "delta", "uncalibrated", "paper"),
        ("--windows", "2", "--answers", "5"),
    ),
    Run(
        "gemma3-270m", "gemma3-270m", ("kld",),
        ("dense", "delta:sparsity=0.75", *DELTA, *STORES, *PAPER, "window-only", *OTHERS),
        ("--length", "2048", "--windows", "2"),
    ),
    Run(
        "smollm2-ruler", "smollm2", results_page.RULER,
        ("dense", "delta", "paper"), ("--lengths", "1024", "--samples", "5"),
    ),
)  # fmt: skip


def missing(run: Run, data: Path | None) -> list[str]:
    """Files that a run needs and that are not there."""
    words = [word.partition("=")[2] or word for word in (*run.tasks, *run.flags)]
    needed = [word.removeprefix("DATA/") for word in words if word.startswith("DATA/")]
    return [name for name in needed if data is None or not (data / name).is_file()]


def main() -> int:
    """Measure what is missing, then draw and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="Folder of data files.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Runs whose name begins so.")
    parser.add_argument("--settings", nargs="+", help="Of these settings only, and dense.")
    parser.add_argument("--page", action="store_true", help="Measure nothing.")
    args = parser.parse_args()
    chosen = [run for run in RUNS if run.name.startswith(tuple(args.only or ("",)))]
    failed = []
    for run in () if args.page else chosen:
        if files := missing(run, args.data):
            print(f"{run.name}: left out, for want of {', '.join(files)} in --data", flush=True)
            continue
        if args.settings:
            wanted = [name for name in run.settings if name in ("dense", *args.settings)]
            run = Run(run.name, run.model, run.tasks, tuple(wanted), run.flags)
        print(f"{run.name}: {' '.join(run.settings)}", flush=True)
        words = run.command(str(args.data))
        environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
        done = subprocess.run([sys.executable, *words], cwd=FOLDER.parent, env=environment)
        if done.returncode:
            failed.append(run.name)
    commands = {run.name: "python " + " ".join(run.command("DIR")) for run in RUNS}
    results_page.draw(FOLDER)
    results_page.write(FOLDER, commands)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on with them", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
