"""docs/results.md and README.md's table, from docs/results/*.json; see make_results.py.

What the page says around its tables is in docs/results/page.md, and in ``NOTES`` here.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_delta.evaluate.ruler import RULER as RULER
from mlx_delta.evaluate.table import make_tables
from mlx_delta.measure.results_file import read_results

SPARSE = ("delta", "paper")  # kinds that skip products
BEGIN, END = "<!-- results: docs/make_results.py -->", "<!-- /results -->"

# Of each model: its name in words, and what it is.
MODELS = {
    "smollm2": (
        "SmolLM2-135M-Instruct",
        "Llama architecture, 30 layers, 9:3 heads of 64, 4-bit weights; its sensitivities, "
        "calibrated on other books, and its window of 128 tokens come with the library "
        "(`--model smollm2`).",
    ),
    "gemma3-270m": (
        "Gemma 3 270M",
        "18 layers of which 3 see the whole text, the others windows of 512 tokens; 4:1 heads of "
        "256 (`--model gemma3-270m`).",
    ),
    "demo": (
        "demo",
        "The bundled Llama of 11 M parameters, 6:2 heads of 64, context 16,384.",
    ),
    "demo-bitnet": ("demo-bitnet", "The bundled BitNet b1.58 of 6.7 M parameters."),
}

# Bits of a number over 16: its code, and for each 64 of them a scale and a bias.
PEERS = {
    "kv8": 8.5 / 16,
    "kv4": 4.5 / 16,
    "kv4-rotated": 4.5 / 16,
    "kivi4": 4.5 / 16,
    "kivi2": 2.5 / 16,
}

NAMES = {
    "dense": "dense",
    "delta": "delta, the model's own level",
    "delta:level=0.0008442": "delta, three quarters of the deltas zero",
    "delta:window=64,level=0.0008442": "the same with a window of 64 tokens",
    "delta:sparsity=0.75": "delta, 0.75 of the deltas zero",
    "delta:sparsity=0.8": "delta, 0.8 of the deltas zero",
    "uncalibrated": "delta, as on a model that was not calibrated",
    "delta:kv=balanced": "codes of 4 bits on average",
    "delta:window=64,prefill=tiles,level=0": "prefill by tiles, full keys",
    "delta:window=64,kv=balanced": "codes of 4 bits on average, a window of 64 tokens",
    "delta:kv=small": "codes of 3 bits on average",
    "delta:sparsity=0.75,key_bits=3.5,value_bits=2.75": "held keys by lanes, 3.5 and 2.75 bits",
    "delta:sparsity=0.75,key_bits=3,value_bits=2.5": "held keys by lanes, 3 and 2.5 bits",
    "delta:sparsity=0.8,key_bits=3,value_bits=2.25": "0.8 of the deltas zero, 3 and 2.25 bits",
    "paper": "the paper's preset (θ 0.6)",
    "paper:threshold=1.05": "the paper's preset at θ 1.05",
    "window-only": "far keys dropped",
    "kv8": "mlx-lm's 8-bit cache",
    "kv4": "mlx-lm's 4-bit cache",
    "kv4-rotated": "4 bits, rotated, as llama.cpp",
    "kivi4": "KIVI, 4 bits",
    "kivi2": "KIVI, 2 bits",
}

TASKS = {
    "kld": "Loss",
    "fidelity": "Loss in the chunks of public tools",
    "needles": "Needles",
    "recall": "Recall",
    "winogrande": "WinoGrande",
    "lambada": "LAMBADA",
    "squad": "Questions on paragraphs",
    "perplexity": "Perplexity",
}
NOTES = {
    "fidelity": "llama.cpp's `--kl-divergence` and the tools after it take chunks of 512 tokens "
    "and score the second half of each. Here too, on books in Markdown (the data set WikiText "
    "could not be fetched): 99 % of the tokens diverge by no more than the next column says, the "
    "worst one by the last. Of so short a chunk little is far enough away to be held.",
    "needles": "Words, numbers or passwords told at eight depths of texts of several lengths, and "
    "asked for in the model's chat template, the answer begun for it; found when each of its "
    "tokens ranks first, which for a model of this size is often by a hair: any change loses some "
    "and gains others. *of dense's* is of the needles that dense attention finds, *clear ones* are "
    "those of them whose every token it takes for a tenth likelier than any other, and *nats* says "
    "how much less likely the answers become, on average.",
    "winogrande": "Items of the validation set, no examples. The texts have some "
    "25 tokens: up to 192 tokens nothing is held, and `delta` is dense attention; its records are "
    "dense attention's but for one in 25, which was measured all the same.",
    "lambada": "Passages, spread evenly over the file: whether greedy decoding would write "
    "the last word. Passages of up to 192 tokens are dense attention's for `delta`, as above.",
    "squad": "Questions on whole paragraphs spread over a public subset in SQuAD 2.0's form (6,078 "
    "questions on 16 articles, about half of the official dev set, whose identifiers are partly "
    "changed: **not the official SQuAD v2 dev set**). Greedy answers of one line, up to 24 "
    "tokens, no examples; F1 of their words. To an unanswerable question the right answer is none, "
    "any other counts 0; the two kinds have columns of their own.",
    "recall": 'Facts ("Remember: the password of Anna is silver king.") told in prose and asked '
    "for at the end; the columns say how many tokens later.",
    "ruler": "RULER's tasks that need no data set, with texts and words of our own made from the "
    "description in its paper (arXiv 2404.06654): comparable between settings, not with published "
    "tables. The score is the share of the answers that were given.",
}


def files(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """The results files, by name."""
    found = sorted((folder / "results").glob("*.json"))
    return [(path.stem, read_results(path)) for path in found]


def loss_rows(runs: Sequence[dict[str, Any]], far: bool = True) -> list[str]:
    """A table of KL divergence, what is skipped, and bytes; those of far tokens if asked for."""
    dense = next((r["summary"] for r in runs if r["kind"] == "dense"), None)
    columns = ["setting", "KL divergence", "top-1", "zeros", "prefill", "both", "cache"]
    columns += ["far"] * far
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    order = {name: i for i, name in enumerate(NAMES)}
    for run in sorted(runs, key=lambda run: order.get(run["setting"], len(order))):
        s = run["summary"]
        kl = f"{s['score']:.5f}"
        if s["high"] != s["low"]:
            kl += f" ±{max(s['high'] - s['score'], s['score'] - s['low']):.5f}"
        skipped = ["–"] * 3
        if run["kind"] in SPARSE and s["overall_sparsity"]:  # codes hold nothing
            zeros = s.get("zero_deltas")
            values = (s["prefill_sparsity"], s["overall_sparsity"])
            skipped = ["–" if v is None else f"{v:.3f}" for v in (zeros, *values)]
        share = "–" if dense is None else f"{s['cache_bytes'] / dense['cache_bytes']:.3f}"
        top1 = f"{s['metrics']['top1']:.4f}"
        cells = [named(run), kl, top1, *skipped, share]
        if far:
            found = far_share(run)
            cells.append("–" if found is None else f"{found:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def far_share(run: dict[str, Any]) -> float | None:
    """What far tokens take of 16-bit floats; others' caches store all tokens alike."""
    return PEERS.get(run["setting"], run["summary"].get("far_share"))


def stores_section(found: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What is lost at how many bytes, of every store and model: one table."""
    order = list(MODELS)
    tables, titles = [], []
    for _, data in sorted(found, key=lambda item: order.index(item[1]["model"]["name"])):
        runs = [run for run in data["runs"] if run["task"] == "kld" and run["summary"]]
        own = {run["setting"]: run for run in runs if is_store(run["setting"])}
        if own:
            tables.append(own)
            titles.append(f"{MODELS[data['model']['name']][0]}, {runs[0]['options']['length']:,}")
    shares: dict[str, list[float]] = {}
    for own in tables:
        for setting, run in own.items():
            share = far_share(run)
            if share is not None:
                shares.setdefault(setting, []).append(share)
    # Where several models have a setting, the bytes of the first: masks differ by a little.
    rows = sorted(shares, key=lambda setting: -shares[setting][0])
    lines = [
        f"| setting | far bytes | {' | '.join(titles)} |",
        "| --- | ---: |" + " ---: |" * len(tables),
    ]
    for setting in rows:
        cells = [
            f"{own[setting]['summary']['score']:.5f}" if setting in own else "–" for own in tables
        ]
        name = NAMES.get(setting, setting)
        share = f"{shares[setting][0]:.3f}"
        lines.append(f"| {name} (`{setting}`) | {share} | {' | '.join(cells)} |")
    return lines


def is_store(setting: str) -> bool:
    """Whether a setting stores far tokens in fewer bytes."""
    return setting in PEERS or "key_bits" in setting or "kv=" in setting


def named(run: dict[str, Any]) -> str:
    """A setting in words and as it is written, with how far it got if it is not done."""
    name = NAMES.get(run["setting"])
    text = (
        f"{name} (`{run['setting']}`)" if name and name != run["setting"] else f"`{run['setting']}`"
    )
    done = len(run["records"])
    return text if done >= run["planned"] or not done else f"{text}, {done} of {run['planned']}"


def section(
    name: str, data: dict[str, Any], task: str, runs: list[dict[str, Any]], again: bool
) -> list[str]:
    """A task's heading, note, table and picture; ``again``: the note stands above already."""
    options = runs[0]["options"]
    lines = [f"### {TASKS.get(task, task)}"]
    if task == "kld":
        count = max(run["summary"]["samples"] for run in runs)
        lines[0] += f": windows of {options['length']:,} tokens"
        lines += [
            "",
            f"{count} windows; the first half of each is the prompt, the second is scored.",
            "",
        ]
        lines += loss_rows(runs)
        if len(runs) > 3:
            lines += ["", picture(f"{name}-kld", "KL divergence against what is skipped and bytes")]
        return lines
    lines[0] += of_many(task, runs)
    if NOTES.get(task) and not again:
        lines += ["", NOTES[task]]
    (table,) = make_tables({**data, "runs": runs})
    checks = [run["checked"] for run in runs if run.get("checked")]
    if checks:
        total = sum(check["samples"] for check in checks)
        differing = sum(check["differing"] for check in checks)
        lines += ["", f"Of {total} samples checked so, {differing} differ from dense attention's."]
    lines += ["", table.markdown()]
    if task == "squad":
        lines += ["", *where_held(runs)]
    if task == "needles":
        lines += ["", picture(name, "Needles found by length and depth")]
    return lines


def where_held(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Of the samples in whose prompts something is held, the difference to dense attention."""
    dense = next(run for run in runs if run["kind"] == "dense")
    exact = {record["index"]: record["score"] for record in dense["records"]}
    lines = []
    for run in runs:
        held = [record for record in run["records"] if record["prefill_sparsity"]]
        if run["kind"] == "delta" and len(held) > 1:
            differences = [record["score"] - exact[record["index"]] for record in held]
            room = 1.96 * statistics.stdev(differences) / len(held) ** 0.5
            lines.append(
                f"In {len(held):,} of {len(run['records']):,} prompts `{run['setting']}` holds "
                f"something; on these it differs by {statistics.fmean(differences):+.3f} "
                f"±{room:.3f} from dense attention, with "
                f"{statistics.fmean(record['overall_sparsity'] for record in held):.2f} skipped."
            )
    return lines


def of_many(task: str, runs: Sequence[dict[str, Any]]) -> str:
    """What sets a task's samples apart from others of that task, for its heading."""
    if task == "squad":
        return f": {max(run['planned'] for run in runs):,} of them"
    options = runs[0]["options"]
    if task == "needles" and len(options["lengths"]) == 1:
        return f": {options['texts']} texts of {options['lengths'][0]:,} tokens"
    return ""


def ruler_section(data: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """One table for all of RULER's tasks."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    options = runs[0]["options"]
    samples = max(run["summary"]["samples"] for run in runs)
    lengths = " and ".join(f"{n:,}" for n in options["lengths"])
    lines = ["### RULER's kinds of texts", "", NOTES["ruler"], ""]
    lines += [f"{samples} texts of {lengths} tokens for each task.", ""]
    lines += ["| setting | " + " | ".join(t.removeprefix("ruler-") for t in tasks) + " |"]
    lines += ["| --- |" + " ---: |" * len(tasks)]
    for setting in settings:
        found = {r["task"]: r["summary"]["score"] for r in runs if r["setting"] == setting}
        cells = [f"{found[task]:.3f}" if task in found else "–" for task in tasks]
        lines.append(f"| `{setting}` | " + " | ".join(cells) + " |")
    return lines


def picture(name: str, text: str) -> str:
    """A picture for light and dark pages."""
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="../pictures/{name}-dark.png">\n'
        f'  <img alt="{text}" src="../pictures/{name}-light.png">\n'
        "</picture>"
    )


def page(folder: Path, commands: dict[str, str]) -> str:
    """The whole page."""
    found = files(folder)
    machines = {
        f"{m['device']} of {m['platform']}, mlx {m['mlx']}, mlx-lm {m['mlx_lm']}"
        for _, data in found
        for m in [data["machine"]]
    }
    machine = f"Measured on: {'; '.join(sorted(machines))}; models in float32 without a GPU."
    parts = []
    for model, (title, about) in MODELS.items():
        own = [(name, data) for name, data in found if data["model"]["name"] == model]
        if not own:
            continue
        parts.append(f"## {title}\n\n{about}\n")
        order = {name: i for i, name in enumerate(commands)}
        noted: set[str] = set()
        for name, data in sorted(own, key=lambda item: order.get(item[0], len(order))):
            runs = [run for run in data["runs"] if run["summary"]]
            ruler = [run for run in runs if run["task"].startswith("ruler-")]
            if ruler:
                parts.append("\n".join(ruler_section(data, ruler)) + "\n")
            for task in dict.fromkeys(run["task"] for run in runs if run not in ruler):
                some = [run for run in runs if run["task"] == task]
                lines = section(name, data, task, some, task in noted)
                parts.append("\n".join(lines) + "\n")
                noted.add(task)
            if name in commands:
                parts.append(f"    {commands[name]}\n")
    words = (folder / "results" / "page.md").read_text(encoding="utf-8")
    words = words.replace("{stores}", "\n".join(stores_section(found)))
    return words.replace("{machine}", machine).replace("{results}", "\n".join(parts))


def readme_table(folder: Path) -> str:
    """README.md's table: SmolLM2's loss at 2,048 tokens."""
    data = read_results(folder / "results" / "smollm2-kld-2048.json")
    shown = set(NAMES) - {
        "window-only",
        "kivi2",
        "uncalibrated",
        "delta:level=0.0008442",
        "delta:window=64,level=0.0008442",
        "delta:sparsity=0.75",
        "delta:sparsity=0.8",
    }
    runs = [run for run in data["runs"] if run["summary"] and run["setting"] in shown]
    return "\n".join(loss_rows(runs, far=False))


def with_table(readme: str, table: str) -> str:
    """README.md's text with the table between its marks.

    Raises:
        ValueError: A mark is not there.
    """
    parts = re.split(f"({re.escape(BEGIN)}|{re.escape(END)})", readme)
    if len(parts) != 5:
        raise ValueError(f"README.md must have {BEGIN} and {END} once each.")
    return "".join([*parts[:2], f"\n{table}\n", *parts[3:]])


def write(folder: Path, commands: dict[str, str]) -> None:
    """Write the page and the table."""
    (folder / "results.md").write_text(page(folder, commands), encoding="utf-8")
    readme = folder.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(with_table(text, readme_table(folder)), encoding="utf-8")


def draw(folder: Path) -> None:
    """Draw the pictures that the page shows."""
    for name, data in files(folder):
        tasks = {run["task"] for run in data["runs"] if run["summary"]}
        file, output = str(folder / "results" / f"{name}.json"), folder / "pictures"
        if "kld" in tasks and len([r for r in data["runs"] if r["task"] == "kld"]) > 3:
            flags = ["tradeoff", file, "--tasks", "kld", "--sparsity", "overall"]
            _draw([*flags, "-o", str(output / f"{name}-kld.png")])
        if "needles" in tasks:
            _draw(["needles", file, "-o", str(output / f"{name}.png")])


def _draw(flags: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "mlx_delta.pictures", *flags], check=True)
