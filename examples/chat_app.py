"""A chat in full screen, made with Textual (`pip install textual`, or this package's extra `apps`).

    python examples/chat_app.py --model smollm2

Enter sends, Esc stops, Ctrl-R begins anew, the up key edits the last message, Ctrl-Q leaves.
The model lives on a thread of its own; the screen's event loop never waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import mlx_delta
from mlx_delta.chat import Conversation, ModelThread, Options, Streaming
from mlx_delta.models.anatomy import context_length

try:
    from textual.app import App, ComposeResult
    from textual.containers import VerticalScroll
    from textual.widgets import Footer, Input, Static
except ImportError as error:
    sys.exit(f"error: chat_app.py needs Textual ({error}): pip install textual")


def main() -> int:
    """Run the app; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--system-prompt")
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()
    app = ChatApp(args.model, args.system_prompt, args.max_tokens)
    app.run()
    if app.failure is not None:
        print(f"error: {app.failure}", file=sys.stderr)
    return int(app.failure is not None)


class ChatApp(App[None]):
    """The screen: what was said, a line to write in, and how full the context is."""

    CSS = """
    #talk { height: 1fr; padding: 0 1; }
    .user { color: $accent; margin-top: 1; }
    .error { color: $error; }
    #status { height: 1; color: $text-muted; padding: 0 1; }
    """
    BINDINGS = [
        ("escape", "stop", "Stop"),
        ("ctrl+r", "reset", "Begin anew"),
        ("up", "edit", "Edit the last message"),
        ("ctrl+q", "quit", "Leave"),
    ]

    def __init__(self, model: str, system: str | None, max_tokens: int):
        super().__init__()
        self.failure: str | None = None
        self._names = model, system, max_tokens
        self._thread = ModelThread()
        self._conversation: Conversation | None = None
        self._streaming: Streaming[str] | None = None
        self._editing = False
        self._leaving = False
        self._answer: Static | None = None
        self._text = ""

    def compose(self) -> ComposeResult:
        """The parts of the screen."""
        yield VerticalScroll(id="talk")
        yield Static("loading the model", id="status")
        yield Input(placeholder="message", disabled=True)
        yield Footer()

    # The model's thread.

    def begin(self) -> Conversation:
        """Load; on the model's thread."""
        name, system, max_tokens = self._names
        model, tokenizer = mlx_delta.load(name)
        return Conversation(model, tokenizer, system, Options(max_tokens=max_tokens))

    async def on_mount(self) -> None:
        """Load the model beside the screen."""
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            self._conversation = await asyncio.wrap_future(self._thread.submit(self.begin))
        except (ValueError, OSError, MemoryError) as error:
            self.failure = str(error)
            self.exit()
            return
        line = self.query_one(Input)
        line.disabled = False
        line.focus()
        self._show_status("Enter sends")

    async def action_quit(self) -> None:
        """Leave; what an answer says after that is not shown."""
        self._leaving = True
        self.action_stop()
        self.exit()

    async def on_unmount(self) -> None:
        """Let the model's thread end: an answer that is being made after its next token."""
        if self._conversation is not None:
            self._conversation.stop()
        await asyncio.to_thread(self._thread.close)

    # What is typed.

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Send the line."""
        text, conversation = event.value, self._conversation
        if conversation is None or self._streaming is not None or not text.strip():
            return
        event.input.clear()
        ask = conversation.edit if self._editing else conversation.ask
        if self._editing:
            self._drop_last()
        self._editing = False
        self._add(text, "user")
        self._stream(lambda: ask(text))

    def action_stop(self) -> None:
        """Stop the answer."""
        if self._streaming is not None and self._conversation is not None:
            self._conversation.stop()

    def action_reset(self) -> None:
        """Begin anew."""
        if self._conversation is not None and self._streaming is None:
            self._conversation.reset()
            self.query_one("#talk").remove_children()
            self._show_status("begun anew")

    def action_edit(self) -> None:
        """Take the last message into the line."""
        if self._conversation is None or self._streaming is not None:
            return
        asked = [m["content"] for m in self._conversation.messages if m["role"] == "user"]
        if asked:
            self._editing = True
            line = self.query_one(Input)
            line.value, line.cursor_position = asked[-1], len(asked[-1])
            self._show_status("Enter puts this in the place of the last message")

    # What is shown.

    def _stream(self, make: Callable[[], Iterator[str]]) -> None:
        loop, self._text = asyncio.get_running_loop(), ""
        self._answer = self._add("", "assistant")
        self._show_status("Esc stops")
        self._streaming = self._thread.stream(
            make, lambda piece: loop.call_soon_threadsafe(self._more, piece)
        )
        self._streaming.done.add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._ended, done)
        )

    def _more(self, piece: str) -> None:
        self._text += piece
        if self._leaving:
            return
        if self._answer is not None:
            self._answer.update(self._text)
            self.query_one("#talk", VerticalScroll).scroll_end(animate=False)

    def _ended(self, done: Future[bool]) -> None:
        self._streaming = None
        if self._leaving:
            return
        error = done.exception()
        if error is not None:
            self._add(str(error), "error")
        last = self._conversation.last if self._conversation else None
        self._show_status("" if last is None or error else f"{last.reason}; Enter sends")

    def _add(self, text: str, kind: str) -> Static:
        line = Static(text, classes=kind, markup=False)
        talk = self.query_one("#talk", VerticalScroll)
        talk.mount(line)
        talk.scroll_end(animate=False)
        return line

    def _drop_last(self) -> None:
        lines = list(self.query_one("#talk").children)
        asked = [i for i, line in enumerate(lines) if line.has_class("user")]
        for line in lines[asked[-1] :] if asked else []:
            line.remove()

    def _show_status(self, text: str) -> None:
        conversation = self._conversation
        if conversation is not None:
            context = context_length(conversation.model)
            text = f"{conversation.cached} of {context} tokens; {text}"
        self.query_one("#status", Static).update(text)


if __name__ == "__main__":
    sys.exit(main())
