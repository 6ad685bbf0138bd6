"""The socket: bound before the model is loaded, with a bound on connections."""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm.server import get_system_fingerprint

from .engine import Engine
from .handler import Handler
from .refusal import Refused

_log = logging.getLogger(__name__)


class Listener(ThreadingHTTPServer):
    """A server of HTTP that listens, and serves once it has an engine.

    Args:
        host: Name or address.
        port: 0 for any that is free.
        max_connections: At one time.

    Raises:
        OSError: The address can't be listened on; the message says why in a line.
    """

    daemon_threads = True  # those that wait for a client must not keep the process
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, max_connections: int = 256):
        self._free = threading.BoundedSemaphore(max_connections)
        try:
            found = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family = found[0]
            super().__init__(found[4], Handler)  # type: ignore[arg-type]
        except OSError as error:
            raise OSError(_why_not(host, port, error)) from error

    def server_bind(self) -> None:
        """Bind without a look at the name server, which can take many seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def url(self) -> str:
        """Where OpenAI's clients find the server."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        return f"http://{host}:{self.server_port}/v1"

    def serve(self, engine: Engine) -> None:
        """Serve until :meth:`shutdown` is called."""
        self.RequestHandlerClass = partial(  # type: ignore[assignment]
            Handler, engine, system_fingerprint=get_system_fingerprint()
        )
        self.serve_forever(poll_interval=0.1)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or a refusal if there are too many."""
        if self._free.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # the system has no thread left
                self._free.release()
                raise
            return
        refused = Refused(503, "The server has too many connections; try again later.")
        _refuse_raw(request, refused)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread's work."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line in the log for what went wrong with a connection itself."""
        error = sys.exc_info()[1]
        level = logging.INFO if isinstance(error, OSError) else logging.ERROR
        _log.log(level, "%s: %s: %s", client_address[0], type(error).__name__, error)


def _refuse_raw(connection: socket.socket, refused: Refused) -> None:
    """An answer to a request that is not read."""
    import json

    raw = json.dumps(refused.body()).encode()
    head = (
        f"HTTP/1.1 {refused.status} Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
    )
    try:
        connection.settimeout(0.1)
        connection.sendall(head.encode() + raw)
    except OSError:
        pass


def _why_not(host: str, port: int, error: OSError) -> str:
    """Why an address can't be listened on, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"[server] port {port} of {host} is in use; end what listens there or give --port."
    if error.errno == errno.EACCES:
        return (
            f"[server] port {port} needs rights that this user lacks; give a --port from 1024 on."
        )
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"[server] {host!r} is no name or address of this machine; give another --host."
    return f"[server] {host}:{port} can't be listened on: {(error.strerror or str(error)).lower()}."
