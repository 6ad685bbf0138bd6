"""The command line: mlx-lm's flags, and the delta's."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_delta.cache import prompt_file as prompt_cache
from mlx_delta.cache.layout import text_length
from mlx_delta.config import KEY_BITS, VALUE_BITS, DeltaConfig
from mlx_delta.loading import DEMO, MODEL_SETTING, find_model, load, read_config
from mlx_delta.models.anatomy import context_length, dense_caches
from mlx_delta.models.common import read_delta, setting_of
from mlx_delta.system.blas import blas_status
from mlx_delta.system.cli import run_command

from . import check_options, check_prompt, encode_prompt, make_caches, stream_generate
from .report import Report

DEFAULT_PROMPT = "Once upon a time"

# Prompts shorter than this are prefilled before a progress bar could be read.
PROGRESS_FROM = 4096


def build_parser() -> argparse.ArgumentParser:
    """mlx-lm's own flags, and those of the delta."""
    # ``import mlx_lm.generate`` would give the function of that name.
    parent = importlib.import_module("mlx_lm.generate").setup_arg_parser()
    parser = argparse.ArgumentParser(
        prog="python -m mlx_delta.generate",
        description="Generate text with hybrid delta attention.",
        parents=[parent],
        conflict_handler="resolve",
        add_help=False,
    )
    parser.add_argument(
        "--model",
        default=None,
        help=f"A directory, a Hugging Face repository, or a bundled model. Default: {DEMO!r}.",
    )
    parser.add_argument(
        "--prompt", "-p", default=None, help="Message to the model ('-' reads from stdin)."
    )
    parser.add_argument("--prompt-file", help="A text file with the message to the model.")
    parser.add_argument(
        "--save-prompt-cache",
        metavar="FILE",
        help="Write the caches of the prompt to a file that --prompt-cache-file reads.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead.")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="Generate a second time without the delta and show where the texts first differ.",
    )
    delta = parser.add_argument_group("hybrid delta attention")
    delta.add_argument("--delta-threshold", type=float, help="Change up to which a key is held.")
    delta.add_argument(
        "--delta-threshold-mode",
        choices=("relative", "absolute"),
        help="Threshold relative to each block's spread of keys, or in the keys' own units.",
    )
    delta.add_argument("--delta-window", type=int, help="Tokens before a query's block kept exact.")
    delta.add_argument("--delta-block-size", type=int, help="Tokens in a block.")
    delta.add_argument("--delta-sinks", type=int, help="Keys at the start kept exact.")
    delta.add_argument(
        "--delta-key-bits",
        type=int,
        choices=KEY_BITS,
        help="Store far keys packed: changed values in 16 bits, or as codes of so many bits.",
    )
    delta.add_argument(
        "--delta-value-bits", type=int, choices=VALUE_BITS, help="Store values in so many bits."
    )
    delta.add_argument(
        "--delta-paper",
        action="store_true",
        help="The paper's own setting: one chain, absolute threshold 0.6, a window of 5 %%.",
    )
    delta.add_argument("--no-delta", action="store_true", help="Attend densely.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    smaller = "use a shorter prompt, a smaller --prefill-step-size or a smaller model"
    return run_command(lambda: run(args), smaller)


def run(args: argparse.Namespace) -> None:
    """Load, generate, print.

    Raises:
        ValueError: A flag, file or prompt that can't be used; the message names it.
        OSError: A file that can't be read or written.
    """
    check_flags(args)
    if args.save_prompt_cache:
        prompt_cache.check_writable(args.save_prompt_cache)
    text = read_prompt(args)
    caches: list[Any] | None = None
    metadata: dict[str, str] = {}
    if args.prompt_cache_file:
        caches, metadata = prompt_cache.load(args.prompt_cache_file)
        if args.model not in (None, metadata.get("model")):
            raise ValueError(
                f"--model {args.model} is not the model of the prompt cache "
                f"({metadata.get('model')}); leave --model out, or use another cache."
            )
    name = args.model if args.model is not None else metadata.get("model", DEMO)

    model, tokenizer = load(
        name,
        choose_delta(args, name),
        tokenizer_config=json.loads(metadata.get("tokenizer_config", "{}")),
        model_config={"quantize_activations": True} if args.quantize_activations else None,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    tokens = encode(args, tokenizer, text, caches)
    options = generation_options(args, model, tokenizer)
    cached = text_length(caches or [])
    check_prompt("generate", model, len(tokens), cached)
    check_options("generate", model, options)
    room_for_answer(options, model, len(tokens) + cached)
    if caches is not None and len(caches) != (own := len(dense_caches(model))):
        raise ValueError(f"the prompt cache has {len(caches)} layers but the model has {own}.")
    caches = caches or new_caches(model, options, len(tokens))
    compared = dense_caches(model) if args.compare else None
    if args.save_prompt_cache:
        metadata = {"model": name, "tokenizer_config": "{}"}
        tokens = save_prompt(args.save_prompt_cache, model, tokens, caches, metadata)

    if args.verbose and not args.json:
        if status := blas_status():
            print(status, file=sys.stderr)
        print("=" * 10)
    report = produce(model, tokenizer, tokens, caches, cached, options, show=not args.json)
    dense = None
    if compared is not None:
        mx.random.seed(args.seed or 0)
        dense = produce(model, tokenizer, tokens, compared, 0, options, show=False)
    if args.json:
        print(json.dumps(report.to_dict(name, setting_of(model), dense), ensure_ascii=False))
    elif args.verbose:
        print("=" * 10)
        print("\n".join(report.lines(dense)))


def check_flags(args: argparse.Namespace) -> None:
    """Refuse combinations of flags that contradict each other.

    Raises:
        ValueError: One of these.
    """
    delta_flags = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(args).items()
        if name.startswith("delta_") and value not in (None, False)
    ]
    if args.no_delta and delta_flags:
        raise ValueError(f"--no-delta and {delta_flags[0]} contradict each other; drop one.")
    if args.no_delta and args.compare:
        raise ValueError("--compare needs the delta; drop --no-delta.")
    if args.compare and (args.prompt_cache_file or args.draft_model):
        raise ValueError("--compare works from the prompt alone; drop the cache or draft model.")
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; drop one.")
    if args.image:
        raise ValueError("--image is given, but the models here read text only.")
    if args.max_tokens == 0 or args.max_tokens < -1:
        raise ValueError(f"--max-tokens must be positive (or -1) but got {args.max_tokens}.")
    if args.prefill_step_size < 1:
        raise ValueError(f"--prefill-step-size must be >= 1 but got {args.prefill_step_size}.")


def read_prompt(args: argparse.Namespace) -> str:
    """The message: from --prompt-file, stdin or --prompt."""
    if args.prompt_file is not None:
        try:
            return Path(args.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {args.prompt_file} is not UTF-8 text.") from error
        except OSError as error:
            reason = (error.strerror or "it can't be read").lower()
            raise OSError(
                f"--prompt-file {args.prompt_file}: {reason}; give a text file."
            ) from error
    if args.prompt == "-":
        return sys.stdin.read()
    if args.prompt is None:
        return DEFAULT_PROMPT
    return args.prompt.replace("\\n", "\n").replace("\\t", "\t")


def choose_delta(args: argparse.Namespace, model: str) -> Any:
    """The setting that the flags ask for: what they do not name stays the model's own."""
    if args.no_delta:
        return None
    names = ["threshold", "threshold_mode", "window", "block_size", "sinks"]
    names += ["key_bits", "value_bits"]
    given = {n: v for n in names if (v := getattr(args, f"delta_{n}")) is not None}
    if args.delta_paper:
        return dataclasses.replace(DeltaConfig.paper(), **given)
    if not given:
        return MODEL_SETTING
    own = read_delta(read_config(find_model(model)).get("delta")) or DeltaConfig()
    return dataclasses.replace(own, **given)


def encode(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, text: str, caches: list[Any] | None
) -> list[int]:
    """Token ids of the message, in the chat template if there is one.

    Raises:
        ValueError: The message is empty, or the template's options are not JSON.
    """
    if not text.strip():
        raise ValueError("the prompt is empty; give --prompt or --prompt-file some text.")
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        if caches is None:
            return encode_prompt(tokenizer, text)
        # A prompt cache already holds the beginning of the text.
        return tokenizer.encode(text, add_special_tokens=False)
    try:
        template = json.loads(args.chat_template_config or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--chat-template-config is not JSON: {error}.") from error
    messages = [{"role": "user", "content": text}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    prefilled = args.prefill_response is not None
    if prefilled:
        messages.append({"role": "assistant", "content": args.prefill_response})

    def apply() -> str:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=prefilled,
            add_generation_prompt=not prefilled,
            **template,
        )

    prompt = apply()
    if caches is not None:
        # The cache holds what comes before the message: keep what begins with it.
        marker = "<query>"
        messages[-1]["content"] = marker
        prompt = prompt[apply().index(marker) :]
    return tokenizer.encode(prompt, add_special_tokens=False)


def generation_options(
    args: argparse.Namespace, model: nn.Module, tokenizer: TokenizerWrapper
) -> dict[str, Any]:
    """mlx-lm's options for its generators."""
    mx.random.seed(args.seed or 0)
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
        draft_model, draft_tokenizer = load(args.draft_model)
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"--draft-model {args.draft_model} has {draft_tokenizer.vocab_size} tokens but the "
                f"model has {tokenizer.vocab_size}; they must share a tokenizer."
            )
        options |= {"draft_model": draft_model, "num_draft_tokens": args.num_draft_tokens}
    return options


def room_for_answer(options: dict[str, Any], model: nn.Module, prompt_tokens: int) -> None:
    """Stop at the end of the model's context, and say so."""
    context = context_length(model)
    if context is None:
        return
    room = max(1, context - prompt_tokens)
    if not 0 < options["max_tokens"] <= room:
        print(
            f"note: at most {room} tokens fit the model's context of {context} after the prompt.",
            file=sys.stderr,
        )
        options["max_tokens"] = room


def new_caches(model: nn.Module, options: dict[str, Any], prompt_tokens: int) -> list[Any]:
    """Empty caches for a prompt; of the draft model too, if there is one."""
    caches = make_caches(model, prompt_tokens, options.get("max_kv_size"))
    if "draft_model" in options:
        caches += make_prompt_cache(options["draft_model"])
    return caches


def save_prompt(
    file: str, model: nn.Module, tokens: list[int], caches: list[Any], metadata: dict[str, str]
) -> list[int]:
    """Prefill the prompt, write its caches, and return the tokens still to be fed.

    All but the last token go into ``caches``, since the last one's logits begin the answer; the
    file holds them all.
    """
    if len(tokens) > 1:
        for _ in generate_step(mx.array(tokens[:-1]), model, max_tokens=0, prompt_cache=caches):
            pass
    whole = copy.deepcopy(caches)
    mx.eval(model(mx.array(tokens[-1:])[None], cache=whole))
    prompt_cache.save(file, whole, metadata)
    return tokens[-1:]


def produce(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    caches: list[Any],
    cached: int,
    options: dict[str, Any],
    show: bool,
) -> Report:
    """Generate, printing the text as it comes, and take stock."""
    start = time.perf_counter()
    bar = None
    if "draft_model" not in options:
        hidden = len(tokens) < PROGRESS_FROM or not sys.stderr.isatty()
        bar = tqdm(total=len(tokens), desc="Prefill", unit="tok", leave=False, disable=hidden)
        options = {**options, "prompt_progress_callback": lambda n, _: bar.update(n - bar.n)}
    text = ""
    ids: list[int] = []
    response: GenerationResponse | None = None
    responses: Iterator[GenerationResponse] = stream_generate(
        model, tokenizer, tokens, prompt_cache=caches, **options
    )
    for response in responses:
        if bar is not None and not ids:
            bar.close()
        text += response.text
        ids.append(response.token)
        if show:
            print(response.text, end="", flush=True)
    if show:
        print()
    assert response is not None  # mlx-lm always ends with one
    return Report.of(text, ids, response, caches, cached, time.perf_counter() - start)
