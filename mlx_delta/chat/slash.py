"""Commands within a chat: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_delta.cache import HeldKeys
from mlx_delta.cache.check_state import leaves
from mlx_delta.measure.settings import scratch_nbytes
from mlx_delta.measure.sparsity import measure_sparsity
from mlx_delta.models.common import model_setting
from mlx_delta.wording import nearest

from . import saved
from .conversation import Conversation
from .setting import change, describe, written

HELP = {
    "/help": "these lines",
    "/reset": "begin anew, with the same system prompt",
    "/undo": "take back the last message and its answer",
    "/retry": "answer the last message anew",
    "/edit [TEXT]": "put another message in the place of the last one, and answer it",
    "/system [TEXT]": "show or change the system prompt; /system - leaves it out",
    "/save [FILE]": "write the conversation to a file",
    "/load FILE": "go on with the conversation of a file",
    "/setting [NAME=VALUE ...]": "show or change the setting: temp, kv=balanced, delta=off ...",
    "/stats": "tokens, context, cache and speeds",
    "/quit": "leave, as Ctrl-D does",
}
NAMES = [line.split()[0] for line in HELP]
ALIASES = {"/exit": "/quit", "/bye": "/quit", "/?": "/help", "/settings": "/setting"}

MORE_HELP = (
    'A message of several lines begins and ends with """; a backslash at the end of a line',
    "goes on in the next. // begins a message that begins with a slash. Ctrl-C stops an answer.",
)

Answer = Iterator[str]


class Slash:
    """Runs commands.

    Args:
        conversation: What they are about.
        model_name: As it was asked for.
        tell: Shows what was asked for.
        edit: Asks for a text, given the one that there is; ``None`` where nobody can be asked.

    Attributes:
        left: Whether /quit was given.
    """

    def __init__(
        self,
        conversation: Conversation,
        model_name: str,
        tell: Callable[[str], None],
        edit: Callable[[str], str | None] | None,
    ):
        self.conversation = conversation
        self.model_name = model_name
        self.left = False
        self._tell = tell
        self._edit = edit
        self._file: Path | None = None

    def run(self, line: str) -> Callable[[], Answer] | None:
        """Run a command; one that is to be answered returns what begins the answer.

        Raises:
            ValueError: There is no such command, or it can't be done.
            OSError: A file can't be read or written.
        """
        name, _, rest = line.strip().partition(" ")
        name, rest = ALIASES.get(name, name), rest.strip()
        if name not in NAMES:
            hint = nearest(name, NAMES)
            raise ValueError(f"there is no command {name}{hint}; /help lists them.")
        answer: Callable[[], Answer] | None = getattr(self, name.removeprefix("/"))(rest)
        return answer

    def help(self, rest: str) -> None:
        """/help."""
        width = max(map(len, HELP))
        self._tell("\n".join([*(f"{name:{width}}  {text}" for name, text in HELP.items())]))
        self._tell("\n".join(MORE_HELP))

    def quit(self, rest: str) -> None:
        """/quit."""
        self.left = True

    def reset(self, rest: str) -> None:
        """/reset."""
        self.conversation.reset()
        self._tell("the conversation begins anew.")

    def undo(self, rest: str) -> None:
        """/undo."""
        text = self.conversation.undo()
        self._tell(f"taken back: {text if len(text) <= 60 else text[:60] + '...'}")

    def retry(self, rest: str) -> Callable[[], Answer]:
        """/retry."""
        return self.conversation.retry

    def edit(self, rest: str) -> Callable[[], Answer] | None:
        """/edit."""
        if not rest:
            questions = [m["content"] for m in self.conversation.messages if m["role"] == "user"]
            if not questions:
                raise ValueError("there is no message yet.")
            if self._edit is None:
                raise ValueError("give the new message: /edit TEXT.")
            rest = self._edit(questions[-1]) or ""
            if not rest.strip():
                return None
        return lambda: self.conversation.edit(rest)

    def system(self, rest: str) -> None:
        """/system."""
        if rest:
            self.conversation.system = None if rest == "-" else rest
        self._tell(f"system: {self.conversation.system or 'none'}")

    def save(self, rest: str) -> None:
        """/save."""
        file = Path(rest) if rest else self._file
        if file is None:
            raise ValueError("give a file: /save FILE.")
        delta = model_setting(self.conversation.model)
        self._file = saved.write(
            file,
            saved.Saved(
                self.conversation.messages,
                self.conversation.system,
                self.model_name,
                None if delta is None else written(delta),
            ),
        )
        self._tell(f"saved in {self._file}")

    def load(self, rest: str) -> None:
        """/load."""
        if not rest:
            raise ValueError("give a file: /load FILE.")
        found = saved.read(rest)
        conversation = self.conversation
        conversation.reset()
        conversation.messages, conversation.system = found.messages, found.system
        self._file = Path(rest)
        n = len(found.messages) // 2
        count = "1 message with its answer" if n == 1 else f"{n} messages with their answers"
        self._tell(f"{count}, {self._room()}.")
        if found.model is not None and found.model != self.model_name:
            self._tell(f"{found.model} gave the answers; {self.model_name} goes on.")

    def setting(self, rest: str) -> None:
        """/setting."""
        if rest:
            change(self.conversation, rest)
        self._tell("\n".join([f"model: {self.model_name}", *describe(self.conversation)]))

    def stats(self, rest: str) -> None:
        """/stats."""
        self._tell("\n".join(self._figures()))

    def _room(self) -> str:
        context = self.conversation.context
        return f"{self.conversation.tokens} tokens" + (f" of {context}" if context else "")

    def _figures(self) -> Iterator[str]:
        conversation, last = self.conversation, self.conversation.last
        yield f"conversation: {self._room()}, {len(conversation.messages)} messages"
        yield f"delta: {written(model_setting(conversation.model))}"
        caches = leaves(conversation.caches)
        if caches:
            size = sum(cache.nbytes for cache in caches)
            dense = sum(c.dense_nbytes if isinstance(c, HeldKeys) else c.nbytes for c in caches)
            skipped = measure_sparsity(caches, conversation.cached).overall
            of = f", {skipped:.3f} of the products skipped" if skipped else ""
            yield (
                f"cache: {conversation.cached} tokens, {size / 1e6:.2f} MB (dense: "
                f"{dense / 1e6:.2f} MB){of}"
            )
            if scratch := scratch_nbytes(caches):
                yield (
                    f"besides: {scratch / 1e6:.2f} MB written out while decoding, as there is no "
                    "GPU to read stored keys"
                )
        if conversation.draft_caches:
            size = sum(cache.nbytes for cache in conversation.draft_caches)
            yield f"draft model's cache: {size / 1e6:.2f} MB"
        if last is not None:
            yield (
                f"last answer: {last.reused} tokens were in the cache, {last.fed} were fed in "
                f"{last.feed_seconds:.2f} s, {last.generated} drawn at "
                f"{last.generated / max(last.answer_seconds, 1e-9):.1f} per second"
            )
        yield f"peak memory: {mx.get_peak_memory() / 1e9:.3f} GB"
