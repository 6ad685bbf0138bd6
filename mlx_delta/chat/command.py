"""The command line: load a model, read messages, show answers."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator

from mlx_delta.checkpoint.catalogue import CATALOGUE
from mlx_delta.checkpoint.obtain import is_here
from mlx_delta.generate.command import choose_delta, choose_seed
from mlx_delta.generate.conversation import template_options
from mlx_delta.loading import DEMO, load
from mlx_delta.measure.limit import said_of_caches
from mlx_delta.models.common import model_setting
from mlx_delta.system.cli import run_command
from mlx_delta.system.memory import parse_bytes, set_limit

from .conversation import Conversation
from .flags import build_parser, check_flags
from .options import Options
from .setting import written
from .slash import NAMES, Slash
from .terminal import Terminal, stopped_by_interrupt

REAL = "smollm2"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    failed = 0

    def run() -> None:
        nonlocal failed
        failed = chat(args)

    status = run_command(run, "use a smaller --prefill-step-size or a smaller model")
    return status or int(failed > 0)


def chat(args: argparse.Namespace) -> int:
    """Load and talk, until the input ends.

    Returns:
        How many messages or commands could not be done; 0 where somebody typed them and saw it.

    Raises:
        ValueError: A flag that can't be used; the message names it.
        OSError: A file that can't be read.
        MemoryError: The model is larger than the memory.
    """
    check_flags(args)
    terminal = Terminal(NAMES)
    name = choose_model(args.model, terminal)
    conversation = begin(args, name)
    slash = Slash(conversation, name, terminal.tell, _editor(terminal))
    if args.load is not None:
        slash.load(args.load)
    if terminal.interactive:
        context = f", context {conversation.context} tokens" if conversation.context else ""
        setting = written(model_setting(conversation.model))
        takes = said_of_caches(conversation.model)
        terminal.say(f"{name}, delta: {setting}{context}{takes}", "bold")
        terminal.say("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    failed = 0
    while not slash.left:
        try:
            if not turn(terminal, conversation, slash):
                break
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
            terminal.end_line()
            terminal.say("interrupted; /quit or Ctrl-D leaves.")
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            terminal.end_line()
            terminal.say(f"error: {error}", "error")
            failed += not terminal.interactive
    return failed


def choose_model(name: str | None, terminal: Terminal) -> str:
    """The model asked for; or the real one if it is here, and what to do if it is not."""
    if name is not None:
        return name
    entry = CATALOGUE[REAL]
    if is_here(REAL):
        terminal.say(f"no --model is given: {REAL} ({entry.title}), which is here.")
        return REAL
    terminal.say(
        f"no --model is given: the bundled {DEMO!r}, which only continues texts. A real model is "
        f"one install away: `python -m mlx_delta.chat --model {REAL}` fetches {entry.title} once, "
        f"{entry.size / 1e6:.0f} MB, licence {entry.licence}; later --model can be left out."
    )
    return DEMO


def begin(args: argparse.Namespace, name: str) -> Conversation:
    """The conversation that the flags ask for, without messages."""
    template = None if args.ignore_chat_template else template_options(args)
    set_limit(None if args.memory_limit is None else parse_bytes(args.memory_limit))
    model, tokenizer = load(
        name,
        choose_delta(args, name),
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    draft_model = None
    if args.draft_model is not None:
        draft_model, other = load(args.draft_model, trust_remote_code=args.trust_remote_code)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"--draft-model {args.draft_model} has other tokens than the model; they must "
                "share a tokenizer."
            )
    choose_seed(args)
    given = {option: getattr(args, option) for option in vars(Options())}
    return Conversation(
        model,
        tokenizer,
        args.system_prompt,
        Options(**given),
        draft_model,
        template,
        args.max_kv_size,
    )


def turn(terminal: Terminal, conversation: Conversation, slash: Slash) -> bool:
    """Read a message or command and answer it; whether there was one."""
    found = terminal.read()
    if found is None:
        return False
    text, may_command = found
    if not text.strip():
        return True
    begin_answer: Callable[[], Iterator[str]] | None
    if may_command and text.startswith("/") and not text.startswith("//"):
        begin_answer = slash.run(text)
        if begin_answer is None:
            return True
    else:
        text = text[1:] if may_command and text.startswith("//") else text
        begin_answer = functools.partial(conversation.ask, text)
    show(terminal, conversation, begin_answer)
    return True


def show(
    terminal: Terminal, conversation: Conversation, begin_answer: Callable[..., Iterator[str]]
) -> None:
    """Show an answer as it comes, and what it took; Ctrl-C ends it."""
    with stopped_by_interrupt(conversation.stop):
        answer = begin_answer()
        for piece in answer:
            terminal.show(piece)
    terminal.end_line()
    last = conversation.last
    if last is None:
        return
    notes = {
        "length": "cut off at max_tokens; /setting max_tokens=... allows more",
        "context": "cut off: the context is full; /undo takes the last exchange back, /reset "
        "begins anew",
        "interrupted": "stopped"
        if last.generated
        else "stopped before the answer began: the message was not kept",
    }
    if last.reason in notes:
        terminal.say(f"[{notes[last.reason]}]")
    if terminal.interactive:
        of = f" of {conversation.context}" if conversation.context else ""
        speed = last.generated / max(last.answer_seconds, 1e-9)
        terminal.say(f"[{conversation.tokens}{of} tokens; {speed:.1f} per second]")


def _editor(terminal: Terminal) -> Callable[[str], str | None] | None:
    """Asks for a text to stand in another one's place, where somebody can be asked."""
    if not terminal.interactive or not sys.stdout.isatty():
        return None

    def edit(text: str) -> str | None:
        found = terminal.read(text)
        return None if found is None else found[0]

    return edit
