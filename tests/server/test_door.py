"""Who may come in, and what they are told who may not or who ask for what is not there."""

from __future__ import annotations

import gzip
import json
import socket

import openai
import pytest
import requests

from .parrot import CONTEXT, words
from .running import Running, running

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "greet"}]


def raw(server: Running, *parts: bytes) -> bytes:
    """What the server answers to bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


def error_of(response: requests.Response) -> str:
    """The message of an error, whose form is checked."""
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].endswith(".")
    return body["error"]["message"]


def test_what_is_served_is_listed(parrot):
    with parrot.client() as client:
        (model,) = client.models.list()
        assert (model.id, model.object, model.context_length) == ("parrot", "model", CONTEXT)
        assert client.models.retrieve("parrot").id == "parrot"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("eagle")


def test_health_and_figures(parrot):
    assert requests.get(parrot.root + "/health", timeout=9).json() == {"status": "ok"}
    parrot.text("greet")
    found = requests.get(parrot.root + "/stats", timeout=9).json()
    assert found["running"] == 0 and found["cached_prompts"] >= 1 and found["cached_bytes"] > 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "The request's body is not JSON: "),
        (b"", 400, "The request's body is not JSON: "),
        (b"\xff{}", 400, "The request's body is not UTF-8 text."),
        (rb'{"prompt": "\ud800"}', 400, "The request's body is not UTF-8 text."),
        (b"[1]", 400, "The request's body must be a JSON object but is a list."),
        (b"[" * 100_000, 400, "The request's body is nested too deeply."),
        (b'{"temperature": NaN}', 400, "The request's body is not JSON: NaN is no number"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "The request's body is not JSON: "),
        ({}, 400, "prompt is missing."),
        ({"prompt": "greet", "model": "eagle"}, 404, 'There is no model "eagle" here; '),
        ({"prompt": words(CONTEXT + 1)}, 400, f"The prompt has {CONTEXT + 1} tokens but the "),
        ({"prompt": "x" * 20_000}, 400, "The prompt has 20000 characters, more than "),
        ({"prompt": [1, 2, 99_999]}, 400, "prompt has token 99999 but the model has 0 to "),
        ({"prompt": " "}, 400, "The prompt is empty; give at least one token."),
        ({"prompt": "greet", "max_tokens": 0}, 400, "max_tokens must be a whole number "),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, int) else "",
)
def test_a_wrong_body_is_refused_and_the_server_goes_on(parrot, body, status, message):
    response = parrot.post(body)
    assert response.status_code == status
    assert error_of(response).startswith(message)
    assert parrot.text("greet") == "Hello, world."


def test_a_role_that_the_template_refuses(parrot):
    response = parrot.post({"messages": [{"role": "ghost", "content": "boo"}]}, CHAT)
    assert response.status_code == 400
    assert error_of(response) == (
        "The model's chat template refuses these messages: no role ghost."
    )


def test_a_template_argument_that_does_not_fit(parrot):
    body = {"messages": HI, "chat_template_kwargs": {"enable_thinking": {"a": []}}}
    assert parrot.post(body, CHAT).status_code == 200
    body["chat_template_kwargs"] = {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}
    assert error_of(parrot.post(body, CHAT)) == "chat_template_kwargs can't set chat_template."


def test_an_image_is_refused_and_not_fetched(parrot):
    image = {"type": "image_url", "image_url": {"url": f"{parrot.root}/health"}}
    response = parrot.post({"messages": [{"role": "user", "content": [image]}]}, CHAT)
    assert response.status_code == 400 and "reads text only" in error_of(response)


@pytest.mark.parametrize("path", ["/v1/none", "/", "/v1/embeddings", "/v1/models/parrot/x"])
def test_an_unknown_path(parrot, path):
    assert requests.get(parrot.root + path, timeout=9).status_code == 404
    response = parrot.post({}, path)
    assert response.status_code == (405 if "models" in path else 404)
    error_of(response)


def test_a_wrong_method(parrot):
    response = requests.get(parrot.url + "/completions", timeout=9)
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    response = parrot.post({}, "/health")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET")
    response = requests.put(parrot.url + "/completions", json={}, timeout=9)
    assert response.status_code == 501 and error_of(response)


def test_a_large_body_is_refused_unread(parrot_provider):
    with running(parrot_provider, max_body=1000) as server:
        response = server.post({"prompt": "w " * 1000})
        assert response.status_code == 413 and "takes 1000" in error_of(response)
        large = 50_000_000  # the answer arrives though it is still being sent
        head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % large
        assert raw(server, head, bytes(2_000_000)).startswith(b"HTTP/1.1 413 ")
        asking = head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        assert raw(server, asking).startswith(b"HTTP/1.1 413 ")
        assert server.text("greet") == "Hello, world."


def test_a_client_that_asks_first_may_send(parrot):
    body = b'{"prompt": "greet"}'
    head = b"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    answer = raw(parrot, head % len(body), body)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 411),
        (b"Content-Length: -5\r\n", 400),
        (b"Content-Length: many\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n", 411),
        (b"Content-Length: 9\r\nContent-Encoding: gzip\r\n", 415),
        (b"X: " + b"y" * 70_000 + b"\r\n", 431),
        ((b"X: " + b"y" * 60_000 + b"\r\n") * 5, 431),
        (b"Content-Length: 9\r\nContent-Length: 5\r\n", 400),
        (b"Content-Length: " + b"9" * 5000 + b"\r\n", 413),
        (b"Content-Length: " + b"0" * 5000 + b"\r\n", 400),
    ],
    ids=[
        *("none", "negative", "no number", "chunked", "compressed", "long header"),
        *("long headers", "two lengths", "many digits", "many zeros"),
    ],
)
def test_a_wrong_head_is_refused(parrot, head, status):
    answer = raw(parrot, b"POST /v1/completions HTTP/1.1\r\n" + head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    "line", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n", b""]
)
def test_what_is_no_http_does_no_harm(parrot, line):
    with socket.create_connection(("127.0.0.1", parrot.port), timeout=20) as connection:
        connection.sendall(line)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(4096)
    assert parrot.text("greet") == "Hello, world."


def test_a_key_is_asked_for(parrot_provider):
    with running(parrot_provider, api_key="sesame") as server:
        with server.client(api_key="sesame") as client:
            assert client.completions.create(model="parrot", prompt="greet").choices[0].text
        for wrong in ("Sesame", "sesame2", ""):
            response = server.post(
                {"prompt": "greet"}, headers={"Authorization": f"Bearer {wrong}"}
            )
            assert response.status_code == 401 and "API key" in error_of(response)
        with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert requests.get(server.root + "/health", timeout=9).status_code == 200
        assert requests.get(server.root + "/stats", timeout=9).status_code == 401
        # A key that is no ASCII is wrong, and no failure.
        assert raw(
            server, "GET /stats HTTP/1.1\r\nAuthorization: Bearer é\r\n\r\n".encode()
        ).startswith(b"HTTP/1.1 401 ")


def test_pages_of_other_origins_are_kept_out(parrot):
    page = {"Origin": "https://evil.example"}
    response = parrot.post({"prompt": "greet"}, headers=page)
    assert response.status_code == 403 and "--allowed-origins" in error_of(response)
    assert "Access-Control-Allow-Origin" not in response.headers
    response = requests.options(parrot.url + "/completions", headers=page, timeout=9)
    assert response.status_code == 403
    # A page can send this without asking first.
    plain = {**page, "Content-Type": "text/plain"}
    assert parrot.post({"prompt": "greet"}, headers=plain).status_code == 403


@pytest.mark.parametrize("allowed", ["https://good.example", "*"])
def test_pages_of_allowed_origins_are_let_in(parrot_provider, allowed):
    with running(parrot_provider, origins=(allowed,), api_key="sesame") as server:
        page = {"Origin": "https://good.example"}
        response = requests.options(server.url + "/completions", headers=page, timeout=9)
        assert response.status_code == 204
        assert response.headers["Access-Control-Allow-Origin"] == allowed
        assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
        response = server.post(
            {"prompt": "greet"}, headers={**page, "Authorization": "Bearer sesame"}
        )
        assert response.status_code == 200
        assert response.headers["Access-Control-Allow-Origin"] == allowed


HOSTS = {
    "localhost:80": 200,
    "127.0.0.1": 200,
    "[::1]:8080": 200,
    "evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "localhost.evil.example:80": 403,
    "[": 403,
}


def test_a_local_server_has_local_names_only(parrot):
    """A page whose name was made to point here passes itself off as local."""
    for host, status in HOSTS.items():
        head = f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        assert raw(parrot, head).startswith(b"HTTP/1.1 %d " % status), host


def test_who_has_the_key_may_call_the_server_as_it_likes(parrot_provider):
    with running(parrot_provider, api_key="sesame") as server:
        head = b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        assert raw(server, head).startswith(b"HTTP/1.1 200 ")


def test_nothing_is_told_of_the_machine(parrot):
    response = requests.get(parrot.root + "/health", timeout=9)
    assert response.headers["Server"].strip() == "mlx_delta"


def test_a_compressed_body_is_no_json_either(parrot):
    assert parrot.post(gzip.compress(b"{}")).status_code == 400
