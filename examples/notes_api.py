"""A local HTTP service that keeps notes and answers questions about them, on asyncio alone.

    python examples/notes_api.py notes.json --model smollm2 --port 8090
    curl -X POST localhost:8090/notes -d '{"text": "The key is under the mat."}'
    curl -N -X POST localhost:8090/ask -d '{"question": "Where is the key?"}'

    GET /notes                        all notes
    POST /notes {"text": ...}         adds one
    POST /ask {"question": ...}       answers, a JSON object a line: "id", "text" ...,
                                      and at the end "done" or "error"
    DELETE /ask/ID                    stops an answer, as hanging up does

The notes are fed once and kept in the caches: a new one feeds only itself. One thread has the
model, so questions are answered one after another; the event loop waits for none of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlx_delta
from mlx_delta.chat import ContextFullError, Conversation, ModelThread, Options, Streaming
from mlx_delta.system.cli import run_command

LARGEST = 1 << 20  # bytes of a request
WAIT = 30.0  # seconds that a request may take to arrive
WAITING = 8  # questions that may wait
INTRODUCTION = "Answer from these notes."


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: What is wrong with it.
    """

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


class Notes:
    """Texts in a JSON file, which is replaced as a whole."""

    def __init__(self, file: Path):
        self._file = file
        self.texts: list[str] = []
        if file.exists():
            try:
                self.texts = json.loads(file.read_text("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} is not whole JSON; it is left as it is.") from error
            if not isinstance(self.texts, list) or any(type(x) is not str for x in self.texts):
                raise ValueError(f"{file} is not a list of texts; it is left as it is.")
        if not file.parent.is_dir():
            raise FileNotFoundError(f"there is no directory {file.parent}.")

    def add(self, text: str) -> None:
        """Add a note, and write them all."""
        temporary = self._file.with_name(f".{self._file.name}.new")
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                json.dump([*self.texts, text], stream, ensure_ascii=False, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self._file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self.texts.append(text)


class Service:
    """Answers requests.

    Args:
        notes: What is asked about.
        thread: The model's.
        model: Name of the model.
        max_tokens: Of an answer.
    """

    def __init__(self, notes: Notes, thread: ModelThread, model: str, max_tokens: int):
        self._notes = notes
        self._thread = thread
        self._model = model
        self._max_tokens = max_tokens
        self._numbers = itertools.count(1)
        self._running: dict[int, tuple[Streaming[str], list[Conversation]]] = {}
        self._conversation: Conversation

    # On the model's thread.

    def begin(self) -> None:
        """Load the model, and feed the notes."""
        model, tokenizer = mlx_delta.load(self._model)
        self._conversation = Conversation(
            model, tokenizer, options=Options(max_tokens=self._max_tokens)
        )
        self.feed()

    def feed(self, *new: str) -> None:
        """Bring the caches to the notes that there are, and new ones."""
        before = self._conversation.system
        self._conversation.system = "\n\n".join([INTRODUCTION, *self._notes.texts, *new])
        try:
            self._conversation.prepare()
        except BaseException:
            self._conversation.system = before
            raise

    def add(self, text: str) -> None:
        """Feed a new note and keep it; neither where one of the two can't be done."""
        self.feed(text)
        try:
            self._notes.add(text)
        except OSError:
            self.feed()
            raise

    # On the event loop.

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request of a connection."""
        try:
            try:
                async with asyncio.timeout(WAIT):
                    method, path, body = await read_request(reader)
                await self._answer(method, path, body, reader, writer)
            except Refused as refused:
                await send(writer, refused.status, {"error": str(refused)})
            except TimeoutError:
                await send(writer, "408 Request Timeout", {"error": "the request did not arrive"})
            except (ValueError, OSError, MemoryError) as error:
                if isinstance(error, ConnectionError):
                    raise
                await send(writer, "500 Internal Server Error", {"error": str(error)})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(
        self,
        method: str,
        path: str,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        match method, path.strip("/").split("/"):
            case "GET", ["notes"]:
                await send(writer, "200 OK", {"notes": self._notes.texts})
            case "POST", ["notes"]:
                text = field_of(body, "text")
                try:
                    await asyncio.wrap_future(self._thread.submit(lambda: self.add(text)))
                except ContextFullError as error:
                    full = "the model's context has no room for this note"
                    raise Refused("413 Content Too Large", full) from error
                await send(writer, "201 Created", {"notes": len(self._notes.texts)})
            case "POST", ["ask"]:
                await self._ask(field_of(body, "question"), reader, writer)
            case "DELETE", ["ask", number]:
                running = self._running.get(int(number[-9:])) if number.isdecimal() else None
                if running is None:
                    raise Refused("404 Not Found", f"there is no answer {number[:20]}")
                stop(*running)
                await send(writer, "200 OK", {"stopped": int(number)})
            case _, ["notes" | "ask", *_]:
                raise Refused("405 Method Not Allowed", f"{method} is not for {path}")
            case _:
                raise Refused("404 Not Found", f"there is no {path[:40]}; /notes and /ask are")

    async def _ask(
        self, question: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if len(self._running) >= WAITING:
            raise Refused("503 Service Unavailable", f"{WAITING} questions are waiting already")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        begun: list[Conversation] = []

        def begin() -> Iterator[str]:
            # A copy: the notes' own caches stay as they are for the next question.
            begun.append(self._conversation.copy())
            return begun[0].ask(question)

        def ended(_: Future[bool]) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, None)

        number = next(self._numbers)
        streaming = self._thread.stream(
            begin, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        )
        self._running[number] = streaming, begun
        streaming.done.add_done_callback(ended)
        # The end of what the client sends is the end of its interest.
        gone = asyncio.create_task(reader.read(1))
        try:
            await send_head(writer, "200 OK", chunked=True)
            await send_line(writer, {"id": number})
            while (piece := await next_or_gone(pieces, gone)) is not None:
                await send_line(writer, {"text": piece})
            error = streaming.done.exception()
            last = begun[0].last if begun else None
            reason = "interrupted" if last is None else last.reason
            await send_line(writer, {"error": str(error)} if error else {"done": reason})
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            gone.cancel()
            stop(*self._running.pop(number))


def stop(streaming: Streaming[str], begun: list[Conversation]) -> None:
    """Stop an answer, or see that it never begins."""
    streaming.cancel()
    for conversation in begun:
        conversation.stop()


async def next_or_gone(pieces: asyncio.Queue[str | None], gone: asyncio.Task[bytes]) -> str | None:
    """The next piece; raises where the client hangs up first."""
    getting = asyncio.ensure_future(pieces.get())
    await asyncio.wait([getting, gone], return_when=asyncio.FIRST_COMPLETED)
    if getting.done():
        return getting.result()
    getting.cancel()
    raise ConnectionError("the client has gone")


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """Method, path and body of a request of HTTP/1.1.

    Raises:
        Refused: It is none, or too large.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise Refused("431 Request Header Fields Too Large", "the head is too long") from error
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise Refused("400 Bad Request", "this is not HTTP/1.1")
    headers = {name.strip().lower(): value.strip() for name, _, value in
               (line.partition(":") for line in lines)}  # fmt: skip
    if "origin" in headers:
        raise Refused("403 Forbidden", "pages of a browser may not use this service")
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise Refused("400 Bad Request", "Content-Length is no number")
    if len(length) > 9 or int(length) > LARGEST:
        raise Refused("413 Content Too Large", f"a request may have {LARGEST} bytes")
    return parts[0], parts[1], await reader.readexactly(int(length))


def field_of(body: bytes, name: str) -> str:
    """A text in a JSON body.

    Raises:
        Refused: There is none.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("400 Bad Request", "the body is not JSON") from error
    text = values.get(name) if isinstance(values, dict) else None
    if isinstance(text, str) and text != text.encode("utf-8", "replace").decode():
        raise Refused("400 Bad Request", "half a character is no text")
    if not isinstance(text, str) or not text.strip():
        raise Refused("400 Bad Request", f'the body must be {{"{name}": "..."}}')
    return text


async def send_head(writer: asyncio.StreamWriter, status: str, chunked: bool = False) -> None:
    kind = "Transfer-Encoding: chunked\r\n" if chunked else ""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n{kind}"
    writer.write(head.encode())
    if chunked:
        writer.write(b"\r\n")
    await writer.drain()


async def send(writer: asyncio.StreamWriter, status: str, values: dict[str, Any]) -> None:
    body = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    await send_head(writer, status)
    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()


async def send_line(writer: asyncio.StreamWriter, values: dict[str, Any]) -> None:
    line = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    writer.write(b"%x\r\n%s\r\n" % (len(line), line))
    await writer.drain()


def main() -> int:
    """Run the service; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notes", type=Path, help="a JSON file, made when the first note is added")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--port", type=int, default=8090)
    args = parser.parse_args()
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port must be from 0 to 65535 but got {args.port}")
    return run_command(lambda: asyncio.run(run(args)), "use a smaller model", "Stopped.")


async def run(args: argparse.Namespace) -> None:
    with ModelThread() as thread:
        service = Service(Notes(args.notes), thread, args.model, args.max_tokens)
        await asyncio.wrap_future(thread.submit(service.begin))
        # Of this machine only.
        server = await asyncio.start_server(service.serve, "127.0.0.1", args.port)
        port = server.sockets[0].getsockname()[1]
        print(f"http://127.0.0.1:{port}/notes and /ask; Ctrl-C stops", flush=True)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
