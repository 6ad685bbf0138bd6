"""One conversion from beginning to end; what the command line calls, and Python may too."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from .check import check_directory
from .errors import ConvertError
from .files import format_bytes, sha256
from .output import make_report, write_beside, write_last
from .pipeline import Work, check_space, fingerprint, write_shards
from .plan import Options, Plan, bits_per_weight, make_plan, plan_table
from .progress import Progress
from .sources import SourceOptions, open_source
from .targets import TARGETS, Fit, assess
from .verify import CACHE_BYTES, run_verification
from .weights import Source


@dataclass(frozen=True)
class Job:
    """A conversion to be done.

    Attributes:
        source: Path or hub name.
        output: Directory to be made.
        target: ``mac``, ``ipad`` or ``iphone``.
        options: What becomes of the weights.
        reading: How to read the source.
        delta: Setting of hybrid delta attention; ``None`` for dense attention, ``"source"`` for
            what the source's config.json holds, else the library's default.
        shim: Write ``delta_model.py`` for unmodified mlx-lm.
        context: Tokens to plan memory for.
        kv_bits: Of the key-value cache, for the same.
        memory: The device's memory in GB.
        int8_activations: Let mlx_delta round the activations of ternary layers to int8.
        overwrite: Replace an existing output.
        verify: Compare the result with the source in a process of its own.
        quiet: No progress, no plan.
    """

    source: str
    output: Path
    target: str = "mac"
    options: Options = field(default_factory=Options)
    reading: SourceOptions = field(default_factory=SourceOptions)
    delta: Mapping[str, Any] | Literal["source"] | None = "source"
    shim: bool = False
    context: int = 4096
    kv_bits: int = 16
    memory: float = 16
    int8_activations: bool = True
    overwrite: bool = False
    verify: bool = True
    quiet: bool = False

    def settings(self) -> dict[str, Any]:
        """What decides the output, for the report."""
        return {
            "target": self.target,
            **asdict(self.options),
            "i2s_layout": self.reading.i2s_layout,
            "delta": self.delta,
            "int8_activations": self.int8_activations,
            "mlx_lm_shim": self.shim,
            "context": self.context,
            "kv_bits": self.kv_bits,
            "device_memory_gb": self.memory,
        }


def prepare(job: Job) -> tuple[Source, Plan, Fit]:
    """Read the source's headers and plan the conversion; nothing is written.

    Raises:
        ConvertError: The source or the options are wrong.
    """
    if job.target not in TARGETS:
        raise ConvertError(f"--target must be one of {', '.join(TARGETS)} but is {job.target!r}.")
    source = open_source(job.source, job.reading)
    plan = make_plan(source, job.options)
    context = min(job.context, source.arch.positions)
    fit = assess(source.arch, plan.nbytes, job.target, job.memory, context, job.kv_bits)
    return source, plan, fit


def read_delta(job: Job, source: Source) -> dict[str, Any] | None:
    """The setting of hybrid delta attention for config.json, checked.

    Raises:
        ConvertError: It is not a valid setting.
    """
    from mlx_delta.config import DeltaConfig
    from mlx_delta.sensitivities import BUNDLED

    delta = job.delta
    if job.shim and source.arch.windows:
        raise ConvertError("--mlx-lm-shim is for llama and bitnet models; leave it out.")
    if delta == "source":
        delta = source.config.get("delta", default_delta(source))
    if delta is None:
        return None
    try:
        config = DeltaConfig.from_dict(delta)  # type: ignore[arg-type]
        named = config.sensitivities
        if isinstance(named, str):
            if named not in source.files and not (BUNDLED / named).is_file():
                raise ValueError(f"the file of its sensitivities, {named[:60]!r}, is missing")
        else:
            config.for_layer(0, source.arch.layers)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConvertError(f"the setting of the delta is wrong: {error}") from None
    return config.to_dict()


def default_delta(source: Source) -> dict[str, Any] | None:
    """The library's setting, or ``None`` where it has no model that holds this one's keys."""
    from mlx_delta.config import DeltaConfig
    from mlx_delta.models import get_model_classes

    try:
        get_model_classes({**source.config, "delta": None})
    except ValueError:
        return None
    return DeltaConfig().to_dict()


def describe(source: Source, plan: Plan, fit: Fit) -> str:
    """The plan for people."""
    before = sum(item.weight.source_bytes for item in plan.items)
    lines = [
        f"{source.name}: {source.arch.model_type} from {source.format}, "
        f"{source.arch.layers} layers, {format_bytes(before)}",
        *plan_table(plan),
        f"total {format_bytes(plan.nbytes)} in {len(plan.shards)} file(s), "
        f"{bits_per_weight(plan):.2f} bits a weight, {plan.dtype} where not quantized",
        *(f"left out: {name[:120]} ({why})" for name, why in source.dropped.items()),
        *(f"note: {note}" for note in [*source.notes, *plan.notes]),
        fit.text,
    ]
    return "\n".join(lines)


def convert(job: Job, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Convert; returns the report that is also written.

    Raises:
        ConvertError: Something is wrong; what was done so far stays for the next run, except
            where the reason is the source.
    """
    output = Path(os.path.abspath(job.output.expanduser()))
    source, plan, fit = prepare(job)
    delta = read_delta(job, source)
    check_output(output, source, job.overwrite)
    check_space(output.parent, plan)
    if not job.quiet:
        say(describe(source, plan, fit))
    before = _stamps(source)
    work = Work(output, fingerprint(source, plan, job.settings()))
    # On a GPU MLX keeps freed buffers, up to most of the memory, unless told otherwise.
    cache_limit = mx.set_cache_limit(CACHE_BYTES)
    try:
        if work.resumed:
            say(f"continuing: {len(work.shards)} of {len(plan.shards)} files are done")
        elif work.restarted:
            say("starting over: the unfinished conversion there had other inputs or settings")
        report = _convert_into(work, job, source, plan, fit, delta, say)
        if _stamps(source) != before:
            raise ConvertError("the source changed while it was converted; start again.")
        work.finish(output, job.overwrite)
    finally:
        work.release()
        mx.set_cache_limit(cache_limit)
    say(
        f"{output}: {format_bytes(plan.nbytes)} of weights, {bits_per_weight(plan):.2f} bits a "
        "weight"
    )
    return report


def _convert_into(
    work: Work,
    job: Job,
    source: Source,
    plan: Plan,
    fit: Fit,
    delta: dict[str, Any] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write everything into the working directory."""
    total = sum(item.weight.source_bytes for item in plan.items)
    progress = Progress("converting", total, quiet=job.quiet)
    with ThreadPoolExecutor(1) as pool:
        digests = {path: pool.submit(sha256, path) for path in source.inputs}
        try:
            shards = write_shards(plan, work, progress)
        finally:
            progress.finish()
            for digest in digests.values():
                digest.cancel()
        inputs = {
            path.name: {"bytes": path.stat().st_size, "sha256": _result(digest, path)}
            for path, digest in digests.items()
        }
    notes = write_beside(
        work.folder, source, plan, delta, job.shim, 8 if job.int8_activations else None
    )
    report = make_report(source, plan, shards, inputs, job.settings(), notes)
    report["memory"] = {"fits": fit.verdict, "needed": fit.needed, "usable": fit.usable}
    problems = check_directory(work.folder)
    report["apple_check"] = problems
    if job.target != "mac" and problems:
        raise ConvertError(f"{job.target}s could not load the result: {problems[0]}")
    for problem in problems:
        say(f"note: iPads and iPhones could not load it: {problem}")
    if job.verify:
        if not job.quiet:
            say("comparing the result with the source in a new process")
        report["verification"] = run_verification(job.source, work.folder, job.reading)
        say(f"verified: {report['verification']['summary']}")
    else:
        report["verification"] = None
    for note in notes:
        say(f"note: {note}")
    report["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(work.folder.iterdir())
        if path.suffix in (".json", ".jinja", ".model", ".py") and path.name != "manifest.json"
    } | {name: {"bytes": s["bytes"], "sha256": s["sha256"]} for name, s in shards.items()}
    write_last(work.folder, source, plan, report, job.shim)
    return report


def _result(digest: Any, path: Path) -> str:
    """A checksum; one that was cancelled before it began is computed now."""
    return sha256(path) if digest.cancelled() else str(digest.result())


def _stamps(source: Source) -> list[tuple[int, int]]:
    """Sizes and times of the inputs."""
    return [(p.stat().st_size, p.stat().st_mtime_ns) for p in source.inputs]


def check_output(output: Path, source: Source, overwrite: bool) -> None:
    """Refuse outputs that would destroy something.

    Raises:
        ConvertError: It exists already, or lies within the source or around it.
    """
    real = output.resolve()
    for path in source.inputs:
        folder = path.resolve().parent
        here = path.absolute().parent
        if real in (folder, here.resolve()) or real in folder.parents:
            raise ConvertError(f"the output {output} holds the source; choose another -o.")
        if source.format != "gguf" and here.resolve() in real.parents:
            raise ConvertError(f"the output {output} lies within the source; choose another -o.")
    if output.is_symlink():
        raise ConvertError(f"{output} is a link; give the directory itself.")
    if output.exists():
        if not output.is_dir():
            raise ConvertError(f"{output} is a file; choose another -o.")
        if any(output.iterdir()):
            if not overwrite:
                raise ConvertError(f"{output} exists; choose another -o or add --overwrite.")
            if not (output / "config.json").is_file():
                raise ConvertError(f"{output} is no model directory; remove it yourself.")
    if output.parent.exists() and not os.access(output.parent, os.W_OK):
        raise ConvertError(f"{output.parent} can't be written to; choose another -o.")
