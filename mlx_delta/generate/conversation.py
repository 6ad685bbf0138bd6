"""From a message to the tokens that the model is fed: chat templates, and turns left open.

A template is a program that comes with a model. It runs in jinja's sandbox, within a time and a
length; what goes wrong in it is said in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_delta.measure.text import context_length

from .checks import encode_prompt

DEFAULT_PROMPT = "Once upon a time"

TEMPLATE_SECONDS = 5.0
_LONGEST_FRAME = 1_000_000  # characters that a template may put around the messages
_LONGEST_PROMPT = 1 << 28  # characters; no context holds as many
_MARKER = "a1message0b"  # stands for the message, to find where the template puts it


def read_prompt(args: argparse.Namespace) -> str:
    """The message: from --prompt-file, stdin or --prompt.

    Raises:
        ValueError: It is no text, or there is none.
        OSError: The file can't be read.
    """
    source = "--prompt"
    try:
        if args.prompt_file is not None:
            source = f"--prompt-file {args.prompt_file}"
            with Path(args.prompt_file).open(encoding="utf-8-sig") as stream:
                text = stream.read(_LONGEST_PROMPT)
        elif args.prompt == "-":
            source = "--prompt -: stdin"
            if sys.stdin is None or sys.stdin.closed:
                raise ValueError(f"{source} is closed.")
            text = sys.stdin.read(_LONGEST_PROMPT)
        elif args.prompt is None:
            text = DEFAULT_PROMPT
        else:
            text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
        text.encode("utf-8")  # bytes of a command line that are no text become lone surrogates
    except UnicodeError as error:
        raise ValueError(f"{source} is not UTF-8 text.") from error
    except OSError as error:
        reason = (error.strerror or "it can't be read").lower()
        raise OSError(f"{source}: {reason}; give a text file.") from error
    if len(text) >= _LONGEST_PROMPT:
        raise ValueError(f"{source} has no end within {_LONGEST_PROMPT} characters.")
    if not text.strip():
        raise ValueError("the prompt is empty; give --prompt or --prompt-file some text.")
    return text


def uses_template(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> bool:
    """Whether the message goes into a chat template."""
    return bool(tokenizer.has_chat_template) and not args.ignore_chat_template


def stays_open(args: argparse.Namespace) -> bool:
    """Whether the user's turn is to be gone on with by the next prompt."""
    return args.save_prompt_cache is not None or args.only_read


def encode(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, text: str, caches: list[Any] | None
) -> list[int]:
    """Token ids of the message, in the chat template if there is one.

    With caches, which hold the beginning of the user's turn, what the template writes before the
    message is left out. With --save-prompt-cache what it writes after the message is left out:
    the turn stays open in the file, as ``mlx_lm.cache_prompt`` leaves it; see :func:`closing`.

    Raises:
        ValueError: The template, or its options, can't be used.
    """
    if not uses_template(args, tokenizer):
        if caches is None:
            return encode_prompt(tokenizer, text)
        # A prompt cache already holds the beginning of the text.
        return tokenizer.encode(text, add_special_tokens=False)
    if caches is None and not stays_open(args):
        return tokenizer.encode(_render(args, tokenizer, text), add_special_tokens=False)
    before, after = _around(args, tokenizer)
    text = text if caches is not None else before + text
    return tokenizer.encode(text if stays_open(args) else text + after, add_special_tokens=False)


def closing(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> list[int]:
    """Token ids that end the user's turn and begin the answer; none without a template.

    Raises:
        ValueError: As for :func:`encode`.
    """
    if not uses_template(args, tokenizer):
        return []
    return tokenizer.encode(_around(args, tokenizer)[1], add_special_tokens=False)


def opening(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> list[int]:
    """Token ids of what comes before any message: a system prompt, mostly; none without a template.

    Raises:
        ValueError: As for :func:`encode`.
    """
    if not uses_template(args, tokenizer):
        return []
    before = _render(args, tokenizer, _MARKER).partition(_MARKER)[0]
    return tokenizer.encode(before, add_special_tokens=False)


def check_length(model: nn.Module, tokenizer: TokenizerWrapper, text: str) -> None:
    """Refuse a text that can't fit the context before minutes are spent on cutting it up.

    Raises:
        ValueError: Even in the vocabulary's longest pieces it has more tokens than the context.
    """
    context = context_length(model)
    if context is None or len(text) <= 1_000_000:
        return
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    if len(text) > context * longest:
        raise ValueError(
            f"the prompt has {len(text)} characters, more than the model's context of {context} "
            "tokens can hold; shorten the prompt."
        )


def _around(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> tuple[str, str]:
    """What the template writes before the user's message, and after it."""
    before, found, after = _render(args, tokenizer, _MARKER).rpartition(_MARKER)
    if not found:
        raise ValueError(
            "the chat template does not write the message as it is, so that a prompt cache can't "
            "go on with it; see --ignore-chat-template."
        )
    return before, after


def _render(args: argparse.Namespace, tokenizer: TokenizerWrapper, text: str) -> str:
    """The conversation as the template writes it."""
    messages = [{"role": "user", "content": text}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    prefilled = args.prefill_response is not None
    if prefilled:
        messages.append({"role": "assistant", "content": args.prefill_response})
    return render(
        tokenizer, messages, template_options(args), "continued" if prefilled else "answered"
    )


def render(
    tokenizer: TokenizerWrapper,
    messages: list[dict[str, str]],
    options: dict[str, Any] | None = None,
    ending: Literal["answered", "continued", "closed"] = "answered",
) -> str:
    """A conversation as the model's chat template writes it.

    Args:
        tokenizer: With a template.
        messages: Of ``role`` and ``content``.
        options: What else the template is given.
        ending: Whether the beginning of an answer is to follow, the last message is to go on, or
            nothing comes.

    Raises:
        ValueError: The template refuses them, takes too long, or makes no text of them.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS):
            rendered = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=ending == "continued",
                add_generation_prompt=ending == "answered",
                **(options or {}),
            )
    except Exception as error:  # whatever the template's own code comes to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"the model's chat template can't be used here: {reason[:200]}; see "
            "--ignore-chat-template."
        ) from error
    if not isinstance(rendered, str):
        raise ValueError("the model's chat template gives no text; see --ignore-chat-template.")
    length = sum(len(message["content"]) for message in messages)
    if len(rendered) > length * 4 + _LONGEST_FRAME:
        raise ValueError(
            f"the model's chat template makes {len(rendered)} characters of a message of "
            f"{length}; see --ignore-chat-template."
        )
    return rendered


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """What --chat-template-config says."""
    try:
        options = json.loads(args.chat_template_config or "{}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--chat-template-config is not JSON: {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(
            f"--chat-template-config must be a JSON object but is {args.chat_template_config!r:.40}"
            "."
        )
    return options


class _TookTooLong(Exception):
    """A template still ran when its time was over."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs too long, where the system has timers for it (not on Windows)."""
    timers = hasattr(signal, "setitimer")
    if not timers or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise _TookTooLong(f"it still runs after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
