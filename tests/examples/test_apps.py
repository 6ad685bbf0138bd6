"""The example apps, as their first lines say to run them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.chat.conftest import write_words

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTE = "The key is under the mat. "


def example(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_words(tmp_path_factory.mktemp("models") / "words")


class TestChatApp:
    @pytest.fixture
    def module(self):
        pytest.importorskip("textual", reason="the full-screen chat needs Textual (extra 'apps')")
        return example("chat_app")

    def test_a_talk(self, module, model):
        async def talk() -> None:
            app, failures = module.ChatApp(str(model), None, 12), []
            asyncio.get_running_loop().set_exception_handler(lambda _, x: failures.append(x))
            async with app.run_test() as pilot:
                line = app.query_one(module.Input)
                await until(pilot, lambda: not line.disabled)
                await pilot.press(*"Hello", "enter")
                await until(pilot, lambda: app._streaming is None and app._conversation.messages)
                assert app._conversation.messages[0]["content"] == "Hello"
                shown = [str(x.render()) for x in app.query_one("#talk").children]
                assert shown[0] == "Hello" and shown[1]
                assert "of 2048 tokens" in str(app.query_one("#status").render())

                app._conversation.options = module.Options(max_tokens=1500)
                await pilot.press("up")
                assert line.value == "Hello"
                await pilot.press(*" you", "enter")
                await until(pilot, lambda: len(app._text) > 5)
                await pilot.press("escape")
                await until(pilot, lambda: app._streaming is None)
                assert app._conversation.last.reason == "interrupted"
                assert [m["content"] for m in app._conversation.messages][0] == "Hello you"
                assert len(app.query_one("#talk").children) == 2

                line.value = "word " * 3000
                await pilot.press("enter")
                await until(pilot, lambda: app.query(".error"))
                assert "no room for an answer" in str(app.query_one(".error").render())
                await pilot.press("ctrl+r")
                await until(pilot, lambda: not app.query_one("#talk").children)
                assert app._conversation.messages == []

                await pilot.press(*"Bye", "enter")  # leaving while it answers
                await until(pilot, lambda: app._text)
                await pilot.press("ctrl+q")
            assert failures == []  # of what the answer still had to say
            assert not app._thread._thread.is_alive()

        asyncio.run(asyncio.wait_for(talk(), 60))

    def test_a_model_that_is_not_there_ends_it_with_a_line(self, module):
        async def talk() -> str | None:
            app = module.ChatApp("/nowhere", None, 12)
            async with app.run_test() as pilot:
                await until(pilot, lambda: app.failure)
            return app.failure

        assert "there is no model directory '/nowhere'" in asyncio.run(talk())


async def until(pilot, ready, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not ready():
            await pilot.pause(0.02)


def test_the_full_screen_chat_says_what_it_needs():
    code = f"import sys, runpy; sys.modules['textual'] = None; runpy.run_path({str(EXAMPLES / 'chat_app.py')!r})"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "needs Textual" in done.stderr and "pip install textual" in done.stderr


class TestDocumentQA:
    @pytest.fixture
    def ask(self, capsys, monkeypatch):
        module = example("document_qa")

        def run(*arguments) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["document_qa.py", *map(str, arguments)])
            status = module.main()
            return status, *capsys.readouterr()

        return run

    def test_the_demo_answers_with_the_passage(self, ask, tmp_path):
        text, kept = EXAMPLES / "memory.txt", tmp_path / "memory.safetensors"
        question = "The password of Anna is"
        arguments = (text, question, "Mr. Holmes said", "--cache", kept, "--max-tokens", 8)
        status, out, err = ask(*arguments)
        assert status == 0 and f"kept in {kept}" in err
        answer, passage = out.split(f"> {question}")[1].split("\n> ")[0].split("[paragraph ")
        assert "silver king" in answer
        assert "Remember: the password of Anna is silver king." in passage
        again = ask(*arguments)
        assert again[:2] == (0, out) and "read before" in again[2]
        other = tmp_path / "other.txt"
        other.write_text("Another text.")
        status, _, err = ask(other, question, "--cache", kept)
        assert status == 1 and "is of another text or model" in err

    def test_with_a_template_and_questions_from_a_pipe(self, ask, model, monkeypatch, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("The cat sleeps.\n\nThe dog barks loudly.\n\nRain falls.")
        monkeypatch.setattr(sys, "stdin", iter_lines("Who barks?\n", "\n", "What of the rain?\n"))
        status, out, _ = ask(text, "--model", model, "--max-tokens", 4)
        assert status == 0
        assert out.index("[paragraph 2] The dog barks loudly.") < out.index("[paragraph 3]")

    def test_a_document_that_cannot_be_read(self, ask, tmp_path):
        assert "there is no text file" in ask("/nowhere.txt", "Who?")[2]
        (tmp_path / "empty.txt").write_text("\n \n")
        assert "empty.txt is empty" in ask(tmp_path / "empty.txt", "Who?")[2]
        (tmp_path / "long.txt").write_text("word " * 20000)
        status, _, err = ask(tmp_path / "long.txt", "Who?")
        assert status == 1 and "the model's context has 16384" in err


class iter_lines:  # noqa: N801 (stands for stdin)
    def __init__(self, *lines: str):
        self._lines = iter(lines)

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        return next(self._lines, "")


class TestNotesAPI:
    def test_notes_questions_and_cancellation(self, model, tmp_path, monkeypatch):
        module = example("notes_api")
        file = tmp_path / "notes.json"

        def fail(_):
            raise OSError("no space")

        async def requests(port: int, service) -> None:
            assert await call(port, "GET", "/notes") == (200, [{"notes": []}])
            for i in range(3):
                added = await call(port, "POST", "/notes", {"text": f"{i} {NOTE}"})
                assert added == (201, [{"notes": i + 1}])
            assert len(json.loads(file.read_text())) == 3
            fed = service._conversation.cached
            assert fed > 3 * 5  # each of some tokens

            status, lines = await call(port, "POST", "/ask", {"question": "Where?"})
            assert status == 200 and lines[0] == {"id": 1}
            assert lines[-1]["done"] in ("stop", "length") and "text" in lines[1]
            again = await call(port, "POST", "/ask", {"question": "Where?"})
            assert again[1][1:] == lines[1:]  # and the notes were not fed again
            assert service._conversation.cached == fed

            for method, path, body, status in (
                ("GET", "/nothing", None, 404),
                ("PUT", "/notes", {}, 405),
                ("POST", "/notes", b"{", 400),
                ("POST", "/notes", {"text": " "}, 400),
                ("POST", "/ask", [1], 400),
                ("POST", "/ask", b"x" * (module.LARGEST + 1), 413),
                ("POST", "/notes", {"text": "word " * 3000}, 413),
                ("POST", "/notes", {"text": "half \ud83d"}, 400),
                ("POST", "/ask", {"question": "word " * 3000}, 200),
                ("DELETE", "/ask/77", None, 404),
            ):
                found = await call(port, method, path, body)
                assert (found[0], list(found[1][-1])) == (status, ["error"]), (method, path)

            # What can't be kept is not answered from either.
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fail)
                assert (await call(port, "POST", "/notes", {"text": NOTE}))[0] == 500
            assert service._conversation.cached == fed and os.listdir(tmp_path) == [file.name]

            service._conversation.options = type(service._conversation.options)(max_tokens=1500)
            for hang_up in (True, False):
                reader, writer = await begin(port, "POST", "/ask", {"question": "Long?"})
                number, got = None, ""
                while "text" not in got:
                    got = (await reader.readline()).decode()
                    number = json.loads(got)["id"] if '"id"' in got else number
                ((conversation,),) = [begun for _, begun in service._running.values()]
                if hang_up:
                    writer.close()
                else:
                    assert (await call(port, "DELETE", f"/ask/{number}"))[0] == 200
                    assert b'"done": "interrupted"' in await reader.read()
                    writer.close()
                async with asyncio.timeout(20):
                    while service._running or conversation.last is None:
                        await asyncio.sleep(0.02)
                assert conversation.last.generated < 1400

        asyncio.run(asyncio.wait_for(served(module, file, model, requests), 120))
        # Another start reads them again.
        assert len(module.Notes(file).texts) == 3
        file.write_text("[1")
        with pytest.raises(ValueError, match="is not whole JSON; it is left as it is"):
            module.Notes(file)


async def served(module, file: Path, model: Path, requests) -> None:
    with module.ModelThread() as thread:
        service = module.Service(module.Notes(file), thread, str(model), 6)
        await asyncio.wrap_future(thread.submit(service.begin))
        server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
        async with server:
            await requests(server.sockets[0].getsockname()[1], service)
    assert threading.current_thread() is threading.main_thread()


async def begin(port: int, method: str, path: str, body=None):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
    data = data or (b"{}" if body == {} else b"")
    writer.write(f"{method} {path} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode())
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
    return reader, writer


async def call(port: int, method: str, path: str, body=None) -> tuple[int, list[dict]]:
    """Status and the JSON lines of a response."""
    reader, writer = await begin(port, method, path, body)
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            received += piece
    writer.close()
    head, _, rest = received.decode().partition("\r\n\r\n")
    lines = [line for line in rest.splitlines() if line.startswith("{")]
    return int(head.split()[1]), [json.loads(line) for line in lines]
