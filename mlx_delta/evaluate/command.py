"""The command line: tasks and settings side by side on one model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_delta.loading import DEMO, MODEL_HELP, load
from mlx_delta.measure.choice import choose_settings, with_samples
from mlx_delta.measure.provenance import model_entry
from mlx_delta.measure.results_file import read_results
from mlx_delta.measure.text import BUNDLED_TEXT, context_length
from mlx_delta.system.arguments import add_delta_argument
from mlx_delta.system.cli import HelpFormatter, Parser, run_command

from .language import FIDELITY_LENGTH, LanguageOptions
from .local_tasks import FILE_TASKS
from .needles import DEPTHS, FORMS, NeedleOptions, NeedleTask
from .recall import TEMPLATES, RecallOptions
from .results import Results
from .ruler import RULER, RulerOptions, RulerTask
from .samples import SampleTask
from .table import render
from .tasks import TASKS, Session, Text, check_tasks

SETTINGS = ("dense", "delta", "window-only", "kv8", "kv4")


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of the harness are named as in mlx_lm.evaluate."""
    parser = Parser(
        prog="python -m mlx_delta.evaluate",
        formatter_class=HelpFormatter,
        description="Measure what ways to keep keys and values save and cost on a model.",
    )
    add = parser.add_argument
    add("--model", default=DEMO, help=MODEL_HELP)
    add(
        "--tasks",
        nargs="+",
        default=list(TASKS[:3]),
        metavar="TASK",
        help=f"{', '.join(TASKS)}; {'=FILE, '.join(FILE_TASKS)}=FILE; or any of "
        "lm-evaluation-harness's. Default: the first three.",
    )
    add(
        "--settings",
        nargs="+",
        default=list(SETTINGS),
        metavar="SETTING",
        help="dense, delta, delta:sparsity=0.75,key_bits=4, delta:kv=balanced, uncalibrated (the "
        "delta without the model's calibration), paper, window-only, kv8, kv4, "
        f"kv4-rotated, kivi4, kivi2, rotating:1024. Default: {' '.join(SETTINGS)}.",
    )
    add_delta_argument(parser)
    add("--seed", type=int, default=0, help="Seed of all that is random. Default: 0.")
    add("--output", type=Path, metavar="FILE.json", help="Keep results here, and go on from them.")
    add("--restart", action="store_true", help="Replace what --output holds.")
    add("--show", type=Path, metavar="FILE.json", help="Only print the tables of a results file.")
    add("--markdown", action="store_true", help="Print Markdown tables.")
    add("--adapter-path", help="LoRA adapters to apply.")
    add("--trust-remote-code", action="store_true", help="Let the tokenizer run its own code.")

    local = parser.add_argument_group("recall, perplexity, kld, fidelity and needles")
    add = local.add_argument
    add("--text", type=Path, default=BUNDLED_TEXT, help="Prose, .txt or .xz. Default: bundled.")
    add("--length", type=int, help="Tokens of a sample or window. Default: 2,048, if they fit.")
    add("--windows", type=int, default=8, help="At most so many windows of the text. Default: 8.")
    add("--distances", type=int, nargs="+", help="Tokens back to where a fact was told.")
    add("--answers", type=int, default=20, help="Answers per distance and template. Default: 20.")
    add("--facts", type=int, help="Facts in a sample, asked or not. Default: one per 112 tokens.")
    add(
        "--templates",
        nargs="+",
        default=["direct", "password"],
        choices=list(TEMPLATES),
        help="Wordings of facts and questions. Default: direct password.",
    )

    samples = parser.add_argument_group("needles and ruler-*")
    add = samples.add_argument
    add("--lengths", type=int, nargs="+", metavar="N", help="Tokens of their texts.")
    add("--samples", type=int, help="Texts of each length. Default: 2 for needles, else 10.")
    add(
        "--depths",
        type=float,
        nargs="+",
        default=list(DEPTHS),
        metavar="SHARE",
        help=f"Where needles are. Default: {' '.join(map(str, DEPTHS))}.",
    )
    add(
        "--needles",
        choices=list(FORMS),
        default="number",
        help="What needles tell: a number, a common word, or a password of two words, which the "
        "bundled models were taught. Default: number.",
    )

    harness = parser.add_argument_group("TASK=FILE and lm-evaluation-harness")
    add = harness.add_argument
    add("--limit", type=int, help="Examples per task. Default: all.")
    add("--num-shots", type=int, help="Worked examples before each question.")
    add("--batch-size", type=int, default=8, help="Requests at a time. Default: 8.")
    add("--max-gen-toks", type=int, help="Tokens to generate at most, whatever the task says.")
    add("--data-dir", type=Path, help="Local task and data files.")
    add(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="Put requests into the model's chat template. Default: not; in needles and ruler-*, "
        "if it has one.",
    )
    add("--max-seq-lengths", type=int, nargs="+", metavar="N", help="Tokens of RULER's texts.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    again = "; run the same command again to go on" if args.output else ""
    return run_command(
        lambda: run(args),
        smaller="use a smaller --length, fewer --settings at a time, or a smaller model",
        interrupted=f"Interrupted{again}.",
    )


def run(args: argparse.Namespace) -> None:
    """Check, load, measure, print.

    Raises:
        ValueError: A flag, text or results file that can't be used; the message names it.
        OSError: A file that can't be read or written.
    """
    if args.show is not None:
        print(render(read_results(args.show), args.markdown) or "Nothing was measured yet.")
        return
    check_tasks(args.tasks, args.data_dir)
    text = Text.read(args.text)
    others = [task for task in args.tasks if task not in TASKS and "=" not in task]
    harness = harness_options(args) if others else None
    delta, settings = choose_settings(args.model, args.settings, args.delta)
    results = Results(model_entry(args.model, args.adapter_path), args.output, args.restart)
    model, tokenizer = load(
        args.model,
        delta,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    session = Session(model, tokenizer, with_samples(settings, model, tokenizer), results)
    try:
        measure(session, args, text, harness)
    finally:
        results.save(force=True)
    print(render(results.data, args.markdown))


def measure(session: Session, args: argparse.Namespace, text: Text, harness: Any) -> None:
    """Carry out the tasks in the order they were given; perplexity and kld are one pass."""
    steps = []
    language = [task for task in args.tasks if task in ("perplexity", "kld")]
    context = context_length(session.model)
    for task in args.tasks:
        if task == "recall":
            options = RecallOptions(
                seed=args.seed,
                answers=args.answers,
                distances=tuple(args.distances) if args.distances else None,
                templates=tuple(args.templates),
                length=args.length,
                facts=args.facts,
            )
            steps.append(session.recall(options, text))
        elif task in language:
            if task == language[0]:
                windows = LanguageOptions(args.windows, args.length)
                steps.append(session.language(language, windows, text))
        elif task == "fidelity":
            chunks = LanguageOptions(args.windows, FIDELITY_LENGTH)
            steps.append(session.language([task], chunks, text))
        elif task == "needles" or task in RULER or "=" in task:
            steps.append(session.samples(sample_task(task, args, session.tokenizer, text, context)))
        else:
            steps.append(session.harness(task, harness))
    for step in steps:
        step()


def sample_task(
    task: str, args: argparse.Namespace, tokenizer: Any, text: Text, context: int | None
) -> SampleTask:
    """A task of samples, by its name."""
    chat = args.apply_chat_template is not False
    lengths = tuple(args.lengths) if args.lengths else None
    if task == "needles":
        texts, depths = args.samples or NeedleOptions.texts, tuple(args.depths)
        needles = NeedleOptions(args.seed, lengths, depths, texts, chat, args.needles)
        return NeedleTask(tokenizer, text.content, needles, context, text.entry())
    if task in RULER:
        samples = args.samples or RulerOptions.samples
        ruler = RulerOptions(args.seed, lengths, samples, chat, args.batch_size)
        return RulerTask(task, tokenizer, ruler, context)
    kind, _, file = task.partition("=")
    path = Path(file).expanduser()
    made: SampleTask = FILE_TASKS[kind](tokenizer, path, args.limit, args.batch_size)
    return made


def harness_options(args: argparse.Namespace) -> Any:
    """The harness's options, as its module takes them."""
    from .harness import HarnessOptions

    return HarnessOptions(
        limit=args.limit,
        num_shots=args.num_shots,
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        max_gen_toks=args.max_gen_toks,
        apply_chat_template=bool(args.apply_chat_template),
        seed=args.seed,
        max_seq_lengths=args.max_seq_lengths,
    )
