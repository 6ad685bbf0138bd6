"""A server in this process, and what speaks to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import requests
from openai import OpenAI

from mlx_delta.server.command import make_store, open_directory
from mlx_delta.server.engine import Engine
from mlx_delta.server.flags import build_parser, check_flags
from mlx_delta.server.listener import Listener
from mlx_delta.server.provider import Provider, check_options, served_by


@dataclasses.dataclass
class Running:
    """A server that serves."""

    engine: Engine
    url: str  # ends in /v1

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])

    def client(self, **options: Any) -> OpenAI:
        """OpenAI's client, which gives errors at once."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return OpenAI(base_url=self.url, **options)

    def complete(self, prompt: str, **options: Any) -> Any:
        """The answer to a prompt, by OpenAI's client."""
        options = {"max_tokens": 8, "temperature": 0, **options}
        with self.client() as client:
            return client.completions.create(
                model=self.engine.served.name, prompt=prompt, **options
            )

    def text(self, prompt: str, **options: Any) -> str:
        """The text of it."""
        return self.complete(prompt, **options).choices[0].text

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> requests.Response:
        """A body as it is, or an object as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(self.root + path, data=raw, timeout=60, **options)

    def connect(self, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
        """A connection by which a request was sent, and nothing read."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(head.encode() + raw)
        return connection


def make_provider(*flags: str) -> Provider:
    """A model, loaded as the command line would."""
    args = build_parser().parse_args([*flags])
    check_flags(args)
    provider = Provider(args)
    provider.load_default()
    check_options(provider, args)
    return provider


@contextlib.contextmanager
def running(provider: Provider, store: Any = None, **changes: Any) -> Iterator[Running]:
    """Serve a loaded model.

    Args:
        provider: Of the model; it is there for the next server too.
        store: Of caches; as the command line makes it by default.
        **changes: Of what is served.
    """
    args, loaded = provider.cli_args, dict(vars(provider))
    served = dataclasses.replace(served_by(provider, args), **changes)
    with Listener("127.0.0.1", 0, served.max_connections) as listener:
        if store is None:
            store = make_store(provider, args, open_directory(args))
        engine = Engine(provider, store, served)
        thread = threading.Thread(target=listener.serve, args=[engine])
        thread.start()
        try:
            yield Running(engine, listener.url)
        finally:
            listener.shutdown()
            thread.join()
            engine.stop_and_join()
            vars(provider).update(loaded)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0, pause: float = 0.005) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(pause)
