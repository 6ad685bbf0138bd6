"""The command line: load, generate, print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_delta.cache import prompt_file
from mlx_delta.cache.check_state import length_of
from mlx_delta.checkpoint.tokenizer import read_tokenizer
from mlx_delta.config import DeltaConfig
from mlx_delta.loading import MODEL_SETTING, find_model, load, read_config, read_setting
from mlx_delta.measure.limit import MemoryWatch, Plan, check_plan
from mlx_delta.measure.usual import usual_setting
from mlx_delta.models.anatomy import dense_caches
from mlx_delta.sensitivities import Sensitivities
from mlx_delta.system.arguments import delta_fields, flag_of_field
from mlx_delta.system.blas import blas_status
from mlx_delta.system.cli import run_command
from mlx_delta.system.kv import check_holds
from mlx_delta.system.memory import parse_bytes, set_limit

from . import make_caches, stream_generate
from .checks import check_caches_fit, check_options, check_prompt, room_for_answer
from .conversation import check_length, closing, encode, read_prompt, uses_template
from .flags import build_parser, check_flags, given_wish
from .kept import Kept
from .memory import check_memory
from .processes import Processes
from .report import Report, Watched, said_of_reading
from .saved import (
    Fed,
    check_model_fits,
    choose_model,
    feed,
    open_caches,
    save_prompt,
    setting_of,
)

# Prompts shorter than this are prefilled before a progress bar could be read.
PROGRESS_FROM = 4096


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    smaller = "use a shorter prompt, a smaller --prefill-step-size or a smaller model"
    return run_command(lambda: run(args), smaller)


def run(args: argparse.Namespace) -> None:
    """Load, generate, print; the first of several processes prints for all.

    Raises:
        ValueError: A flag, file or prompt that can't be used; the message names it.
        OSError: A file that can't be read or written.
        MemoryError: Model or caches are larger than the memory.
    """
    check_flags(args)
    processes = Processes()
    processes.check_flags(args)
    with processes.quiet():
        generate_once(args, processes)


def generate_once(args: argparse.Namespace, processes: Processes) -> None:
    """Load, generate, print.

    Raises:
        ValueError: A flag, file or prompt that can't be used; the message names it.
        OSError: A file that can't be read or written.
        MemoryError: Model or caches are larger than the memory.
    """
    if args.save_prompt_cache is not None:
        prompt_file.check_writable(args.save_prompt_cache)
    text = processes.share_text(lambda: read_prompt(args))
    caches, metadata = open_caches(args)
    name = choose_model(args, caches, metadata)
    # What was begun without a template goes on without one.
    args.ignore_chat_template |= metadata.get("chat_template") == "false"

    delta = choose_delta(args, name) if caches is None else setting_of(caches)
    set_limit(None if args.memory_limit is None else parse_bytes(args.memory_limit))
    if args.memory_limit is not None:
        plan_memory(args, name, delta, text)
    model, tokenizer = load(
        name,
        delta,
        model_config={"quantize_activations": True} if args.quantize_activations else None,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
        **processes.groups(args),
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    check_length(model, tokenizer, text)
    if caches is not None:
        check_model_fits(model, caches)
    tokens = encode(args, tokenizer, text, caches)
    saves = args.save_prompt_cache is not None
    rest = closing(args, tokenizer) if saves and not args.only_read else []
    if processes.size > 1 and args.seed is None:
        args.seed = processes.share_number(secrets.randbits(32))
    seed = choose_seed(args)
    options = generation_options(args, model, tokenizer)
    cached = length_of(caches or [])
    length = cached + len(tokens) + len(rest)
    check_prompt("generate", model, tokens + rest, caches)
    check_options("generate", model, options)
    options["max_tokens"], note = room_for_answer(model, length, args.max_tokens)
    if note is not None:
        print(f"note: {note}.", file=sys.stderr)
    kept = None
    if caches is None:
        caches = make_caches(model, len(tokens) + len(rest), args.max_kv_size)
        if args.cache_dir is not None:
            kept = Kept(args, model, tokenizer, options, processes.size)
    check_caches_fit("generate", model, caches, options)
    check_memory("generate", model, length, options, first=True)
    fed, failed = Fed(), None
    whole = tokens + rest
    watch = MemoryWatch()
    options["prompt_progress_callback"] = watch.progress
    if kept is not None:
        tokens, fed = kept.begin(tokens, rest, caches)
        caches, cached = kept.caches, kept.found
        options["prompt_progress_callback"] = together(watch.progress, kept.progress)
    draft_caches = []
    if "draft_model" in options:
        draft_caches = make_caches(options["draft_model"], length)
        if cached:
            print(
                "note: the draft model has not seen what the prompt cache holds, and guesses "
                "without it.",
                file=sys.stderr,
            )
    compared = dense_caches(model) if args.compare else None

    if args.save_prompt_cache is not None:
        known = {
            "model": name,
            "tokenizer_config": "{}",
            "adapter_path": args.adapter_path or "",
            "chat_template": str(uses_template(args, tokenizer)).lower(),
        }

        def write(filled: list[Any]) -> None:
            nonlocal failed
            try:
                prompt_file.save(args.save_prompt_cache, filled, known)
            except OSError as error:
                failed = error  # the prompt has been read: answer first

        tokens, saved = save_prompt(write, model, tokens, rest, caches, options, draft_caches)
        fed += saved

    def header() -> None:
        if args.verbose and not args.json:
            if status := blas_status():
                print(status, file=sys.stderr)
            print("=" * 10)

    if args.only_read:
        start = time.perf_counter()
        if args.save_prompt_cache is None:
            feed(model, tokens, caches, options)
            fed += Fed(len(tokens), time.perf_counter() - start)
        if kept is not None:
            kept.keep()
        print(said_of_reading(args, whole, fed, cached, caches))
        if failed is not None:
            raise failed
        return

    def came(response: GenerationResponse) -> None:
        answer.append(response.token)
        if kept is not None and len(answer) == 1:
            kept.keep(answer, end=False)  # an answer may be interrupted
        watch.token(len(answer))

    answer: list[int] = []
    report = produce(
        model,
        tokenizer,
        tokens,
        caches,
        options,
        header,
        not args.json,
        fed,
        cached,
        draft_caches,
        came,
    )
    if kept is not None:
        kept.keep(answer)
    report = dataclasses.replace(
        report, seed=seed, share_bytes=processes.of_each(report.cache_bytes)
    )
    dense, watched = None, Watched(answer, tokenizer)
    if compared is not None:
        mx.random.seed(seed or 0)
        dense = produce(model, tokenizer, whole, compared, options, header, False, came=watched)
    if args.json:
        ran = setting_of(caches, getattr(model, "args", None))
        print(json.dumps(report.to_dict(name, ran, dense, watched.odds), ensure_ascii=False))
    elif args.verbose:
        print("=" * 10)
        print("\n".join(report.lines(dense, watched.said)))
    if failed is not None:
        raise failed


def plan_memory(args: argparse.Namespace, name: str, delta: Any, text: str) -> None:
    """Refuse what will not fit the limit, before the weights are read.

    Raises:
        MemoryError: Model and prompt will not fit; the message says what would.
    """
    path = find_model(name)
    config = read_config(path)
    setting = read_setting(path, config) if delta == MODEL_SETTING else delta
    tokenizer = read_tokenizer(path, {}, config.get("eos_token_id"), args.trust_remote_code)
    tokens = len(tokenizer.encode(text)) + max(0, args.max_tokens)
    check_plan(name, Plan.of(path, config, args.prefill_step_size), setting, tokens)


def choose_delta(args: argparse.Namespace, model: str) -> Any:
    """The setting that the flags ask for: what they do not name stays the model's own."""
    if args.no_delta:
        return None
    given, wish = delta_fields(args), given_wish(args)
    if args.delta_paper:
        return DeltaConfig.paper().changed(**given)
    if not given and wish is None:
        usual, why = usual_setting(model)
        if why:
            print(f"note: {why}", file=sys.stderr)
        return usual
    path = find_model(model)
    own = read_setting(path, read_config(path)) or DeltaConfig()
    levels = [flag_of_field(args, name) for name in ("level", "threshold") if given.get(name)]
    for flag in levels if wish is None else [wish]:
        check_holds(own.changed(**given), flag)
    if wish is not None:
        if not isinstance(own.sensitivities, Sensitivities):
            raise ValueError(
                f"{wish} needs a calibrated model, but {model!r} has no sensitivities; run "
                f"`python -m mlx_delta.calibrate --model {model} --sparsity 0.65` first, or set "
                "--delta-level."
            )
        given["level"] = own.sensitivities.level_for(args.delta_sparsity, args.delta_kl)
    return own.changed(**given)


def together(*callbacks: Callable[[int, int], Any]) -> Callable[[int, int], None]:
    """One callback of several."""

    def call(done: int, whole: int) -> None:
        for callback in callbacks:
            callback(done, whole)

    return call


def choose_seed(args: argparse.Namespace) -> int | None:
    """Seed the random numbers; returns the seed, or ``None`` if nothing is drawn."""
    seed = args.seed if args.seed is not None else secrets.randbits(32)
    mx.random.seed(seed)
    return None if args.temp == 0 else seed


def generation_options(
    args: argparse.Namespace, model: nn.Module, tokenizer: TokenizerWrapper
) -> dict[str, Any]:
    """mlx-lm's options for its generators.

    Raises:
        ValueError: One does not fit the model.
    """
    vocabulary = getattr(getattr(model, "args", None), "vocab_size", None)
    for flag, value in (
        ("--top-k", args.top_k + 1),
        ("--min-tokens-to-keep", args.min_tokens_to_keep),
    ):
        if vocabulary is not None and value > vocabulary:
            raise ValueError(f"{flag} asks for more tokens than the model's {vocabulary}.")
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "prefill_step_size": args.prefill_step_size,
        "sampler": make_sampler(
            args.temp,
            args.top_p,
            args.min_p,
            args.min_tokens_to_keep,
            top_k=args.top_k,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        ),
        "max_kv_size": args.max_kv_size,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
    }
    if args.draft_model is not None:
        draft_model, draft_tokenizer = load(
            args.draft_model, trust_remote_code=args.trust_remote_code
        )
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"--draft-model {args.draft_model} has {draft_tokenizer.vocab_size} tokens but the "
                f"model has {tokenizer.vocab_size}; they must share a tokenizer."
            )
        options |= {"draft_model": draft_model, "num_draft_tokens": args.num_draft_tokens}
    return options


def produce(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    caches: list[Any],
    options: dict[str, Any],
    header: Callable[[], None],
    show: bool,
    fed: Fed = Fed(),  # noqa: B008 (frozen)
    cached: int = 0,
    draft_caches: list[Any] | None = None,
    came: Callable[[GenerationResponse], None] = lambda _: None,
) -> Report:
    """Generate, printing the text as it comes, and take stock.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tokens: What is still to be fed.
        caches: The model's.
        options: mlx-lm's.
        header: Prints what comes before the text.
        show: Print the text.
        fed: What was fed before.
        cached: Tokens that came from a prompt cache.
        draft_caches: The draft model's, if there is one.
        came: Called with mlx-lm's response for each token of the answer.
    """
    start = time.perf_counter()
    bar = None
    if "draft_model" not in options:
        hidden = len(tokens) < PROGRESS_FROM or not sys.stderr.isatty()
        bar = tqdm(total=len(tokens), desc="Prefill", unit="tok", leave=False, disable=hidden)
        told = options.get("prompt_progress_callback", lambda *_: None)
        more = together(lambda n, _: bar.update(n - bar.n), told)
        options = {**options, "prompt_progress_callback": more}
    else:
        options = {k: v for k, v in options.items() if k != "prompt_progress_callback"}
    text = ""
    ids: list[int] = []
    response: GenerationResponse | None = None
    # mlx-lm may put quantized caches into the list: without a draft it has to be this very one.
    both = [*caches, *draft_caches] if draft_caches else caches
    responses: Iterator[GenerationResponse] = stream_generate(
        model, tokenizer, tokens, prompt_cache=both, **options
    )
    for response in responses:
        if not ids:
            if bar is not None:
                bar.close()
            if show:
                header()
        text += response.text
        ids.append(response.token)
        came(response)
        if show:
            print(response.text, end="", flush=True)
    if show:
        print()
    assert response is not None  # mlx-lm always ends with one
    seconds = fed.seconds + time.perf_counter() - start
    return Report.of(text, ids, response, caches, cached, seconds, fed, draft_caches or [])
