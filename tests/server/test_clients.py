"""Clients that come, wait, vanish, and are too many; and a server that fails, and that ends."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from mlx_delta.server import room

from .parrot import ParrotProvider, settle, words
from .running import Running, running, wait_for


@pytest.fixture
def held(tmp_path_factory):
    """A server of two rows whose model waits to be told to go on."""
    provider = ParrotProvider(
        tmp_path_factory.mktemp("held"), "--decode-concurrency", "2", "--prompt-concurrency", "2"
    )
    with running(provider, max_queue=3) as server:
        provider.model.hold.paused = True
        yield server
        provider.model.hold.paused = False
        provider.model.hold.steps.release(100)


def stream(server: Running, prompt: str = "count", **options) -> socket.socket:
    """A connection on which an answer streams."""
    return server.connect({"prompt": prompt, "max_tokens": 400, "stream": True, **options})


def let_go(server: Running) -> None:
    """Let the model make the step that it waits with, and wait until it waits with the next."""
    hold = server.engine.model_provider.model.hold
    calls = hold.calls
    hold.steps.release()
    wait_for(lambda: hold.calls > calls)


def until(server: Running, condition: Callable[[], bool]) -> None:
    """Let the model make steps until something is so."""

    def step() -> bool:
        if condition():
            return True
        server.engine.model_provider.model.hold.steps.release()
        return False

    wait_for(step, pause=0.02)


def figures(server: Running) -> dict:
    return server.engine.figures()


def read_until(connection: socket.socket, wanted: bytes, seconds: float = 60) -> bytes:
    """What comes, until this was in it."""
    found = b""
    end = time.monotonic() + seconds
    while wanted not in found:
        assert time.monotonic() < end, f"no {wanted!r} in {seconds} s: {found[-300:]!r}"
        part = connection.recv(4096)
        assert part, f"ended without {wanted!r}: {found[-300:]!r}"
        found += part
    return found


@pytest.mark.parametrize("streams", [True, False], ids=["streaming", "waiting for all"])
def test_a_client_that_vanishes_frees_its_row_within_a_step(held, streams):
    kept, lost = stream(held), stream(held, "w1 count", stream=streams)
    hold = held.engine.model_provider.model.hold
    until(held, lambda: hold.rows == 2)
    while hold.steps.acquire(blocking=False):
        pass  # steps that were given too many
    time.sleep(0.1)
    assert hold.rows == 2
    lost.close()
    let_go(held)  # the step that was under way when it vanished
    assert figures(held)["running"] == 1 and hold.rows == 1
    kept.close()
    hold.steps.release()
    wait_for(lambda: figures(held)["requests"] == 0)


def test_a_reset_connection_is_noticed_as_well(held):
    connection = stream(held)
    wait_for(lambda: figures(held)["running"] == 1)
    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # close sends a reset
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()
    held.engine.model_provider.model.hold.steps.release()
    wait_for(lambda: figures(held)["requests"] == 0)


def test_a_client_that_vanishes_while_it_waits_is_never_worked_on(held):
    working = [stream(held, f"w{i} count") for i in range(2)]
    until(held, lambda: figures(held)["running"] == 2)
    waiting = stream(held, "w9 " * 50 + "count")
    wait_for(lambda: figures(held)["requests"] == 3)
    waiting.close()
    working[0].close()
    until(held, lambda: figures(held)["requests"] == 1)
    assert figures(held)["running"] == 1
    working[1].close()


def test_a_row_goes_to_whoever_waits(held):
    first, second = stream(held), stream(held, "w1 count")
    until(held, lambda: figures(held)["running"] == 2)
    third = stream(held, "greet")
    first.close()
    held.engine.model_provider.model.hold.steps.release(30)
    assert b'"ld."' in read_until(third, b"[DONE]")
    second.close()


def test_too_many_requests_are_told_so(held):
    inside = [stream(held, f"w{i} count") for i in range(5)]
    wait_for(lambda: figures(held)["requests"] == 5)
    with held.client() as client, pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="parrot", prompt="count")
    assert caught.value.code == "queue_full" and caught.value.response.headers["Retry-After"]
    for connection in inside:
        connection.close()
    until(held, lambda: figures(held)["requests"] == 0)
    held.engine.model_provider.model.hold.paused = False
    held.engine.model_provider.model.hold.steps.release(10)
    assert held.text("greet") == "Hello, world."


def test_too_many_connections_are_told_so(parrot_provider):
    with running(parrot_provider, max_connections=2) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        time.sleep(0.3)
        answer = server.connect({"prompt": "count"}).recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"too many connections" in answer
        for connection in silent:
            connection.close()

        def is_served() -> bool:
            with contextlib.suppress(requests.ConnectionError):
                return server.post({"prompt": "greet"}).status_code == 200
            return False

        wait_for(is_served)


def test_a_client_that_does_not_send_its_request_is_let_go(parrot_provider):
    with running(parrot_provider, seconds=0.3) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\n", b""], ids=["headers", "first line"])
def test_a_client_that_sends_byte_by_byte_is_let_go(parrot_provider, head):
    with running(parrot_provider, seconds=0.4) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=0.1)
        connection.sendall(head)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                connection.sendall(b"x")
                if connection.recv(4096) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        raise AssertionError("the connection is still held")


def test_many_at_once_get_their_own_answers(parrot):
    def ask(i: int) -> bool:
        text = parrot.text(words(1 + i % 9, first=i), max_tokens=10 + i)
        return text.strip() == "".join(f"{n}, " for n in range(10 + i)).strip()

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))


def test_a_failed_step_ends_its_requests_and_not_the_server(parrot, parrot_provider):
    hold = parrot_provider.model.hold
    hold.fail = True
    response = parrot.post({"prompt": "greet"})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The server failed: the parrot is ill"
    assert parrot.text("greet") == "Hello, world."
    hold.paused = True
    connection = stream(parrot)
    hold.steps.release(4)
    read_until(connection, b" 1,")
    hold.fail = True
    hold.steps.release(2)
    assert b'"type": "server_error"' in read_until(connection, b"parrot is ill")
    hold.paused = False
    hold.steps.release(2)
    assert parrot.text("greet") == "Hello, world."
    assert parrot.post({"prompt": "w1"}, "/v1/completions").status_code == 200


def test_memory_that_ends_ends_the_newest_answer_only(held, monkeypatch):
    first = stream(held, stop="none")
    until(held, lambda: figures(held)["running"] == 1)
    second = stream(held, "w1 count")  # now surely the newest
    until(held, lambda: figures(held)["running"] == 2)
    held.engine.model_provider.model.hold.steps.release(8)
    read_until(second, b'"0,"')
    found = iter([1000, 1000])  # and still as little when kept caches were let go
    monkeypatch.setattr(room, "free_memory", lambda _=0: (next(found, 1 << 40), "a test"))
    held.engine.model_provider.model.hold.steps.release(20)
    assert b"out_of_memory" in read_until(second, b"out of memory")
    held.engine.model_provider.model.hold.steps.release(20)
    read_until(first, b" 20,")
    assert figures(held)["running"] == 1
    first.close()


def test_answers_on_their_way_are_finished_when_the_server_ends(parrot_provider):
    with running(parrot_provider) as server:
        parrot_provider.model.hold.paused = True
        connection = stream(server, "greet")
        wait_for(lambda: figures(server)["running"] == 1)
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(server.engine.drain(20)))
        thread.start()
        wait_for(lambda: server.engine.is_closing)
        assert server.post({"prompt": "greet"}).status_code == 503
        parrot_provider.model.hold.paused = False
        parrot_provider.model.hold.steps.release(20)
        assert b'"ld."' in read_until(connection, b"[DONE]")
        connection.close()
        thread.join()
        assert done == [True]


def test_answers_that_take_too_long_end_with_an_error(parrot_provider):
    with running(parrot_provider) as server:
        parrot_provider.model.hold.paused = True
        connection = stream(server)
        parrot_provider.model.hold.steps.release(3)
        read_until(connection, b'"0,"')
        assert not server.engine.drain(0.05)
        thread = threading.Thread(target=server.engine.stop_and_join)
        thread.start()
        wait_for(lambda: server.engine._stop)  # else the answer may be done before
        parrot_provider.model.hold.paused = False
        parrot_provider.model.hold.steps.release(2)
        found = read_until(connection, b"shutting down")
        assert json.loads(found.split(b"data: ")[-1])["error"]["type"] == "server_error"
        thread.join()
        assert server.post({"prompt": "greet"}).status_code == 503
        assert server.post({}, "/health").status_code == 405


def test_a_held_model_is_let_go(parrot, parrot_provider):
    """The tests above leave nothing behind."""
    assert not parrot_provider.model.hold.paused
    settle(parrot_provider.model)
    assert figures(parrot)["requests"] == figures(parrot)["running"] == 0
