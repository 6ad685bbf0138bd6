"""One connection: who may come in, what they ask for, and what they are told.

mlx-lm's handler reads the parameters and writes the answers. Around it stand checks of the caller
and of the body, and every error becomes JSON.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm.server import APIHandler, CompletionRequest

from .bodies import normalize, read_json
from .chances import chat_logprobs, text_logprobs
from .engine import Engine
from .job import Job, Request
from .reading import HeadTooLargeError, TimelyReader
from .refusal import Refused, failure

_log = logging.getLogger(__name__)

CHATS = ("/v1/chat/completions", "/chat/completions")
TEXTS = ("/v1/completions",)
READS = ("/v1/models", "/health", "/stats")
_DRAINED = 64 << 20  # bytes of a refused body that are read away, so that the answer arrives
_DRAINING = 2.0  # seconds that this may take


class Handler(APIHandler):
    """mlx-lm's handler with limits, keys and errors of our own."""

    protocol_version = "HTTP/1.1"  # with which a client asks before it sends a large body
    server_version = "mlx_delta"
    sys_version = ""
    response_generator: Engine
    headers: Any

    def setup(self) -> None:
        """Bound how long the client may keep a thread waiting."""
        self.__dict__["timeout"] = self.response_generator.served.seconds
        self._answering = False  # whether a status is on its way to the client
        self._request: Request | None = None
        super().setup()
        self._reader = TimelyReader(self.connection, self.response_generator.served.seconds)
        self.rfile.close()
        self.rfile = io.BufferedReader(self._reader)

    def parse_request(self) -> bool:
        """As Python's, for a head of bounded length."""
        try:
            return super().parse_request()
        except HeadTooLargeError:
            self.send_error(431, "The request's head is too long")
            return False

    # What clients ask.

    def do_GET(self) -> None:
        """Lists of models, health, figures."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Chats and completions."""
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        """What a browser asks before it lets a page ask."""
        self._answer(super().do_OPTIONS)

    def _get(self) -> None:
        path, engine = self.path, self.response_generator
        if path in (*CHATS, *TEXTS):
            raise Refused(405, f"{path} takes POST.", headers={"Allow": "POST"})
        if path == "/stats":
            self._send_json(200, engine.figures())
        elif path == "/v1/models":
            self._send_json(200, {"object": "list", "data": [self._model(engine.served.name)]})
        elif path.startswith("/v1/models/"):
            name = unquote(path.removeprefix("/v1/models/"))
            if name not in engine.served.names:
                raise Refused(404, f"There is no model {name[:80]!r}.", code="model_not_found")
            self._send_json(200, self._model(name))
        elif path == "/health":
            super().do_GET()
        else:
            raise Refused(404, f"There is no {path[:80]!r} here.")

    def _model(self, name: str) -> dict[str, Any]:
        context = self.response_generator.served.context
        length = {} if context is None else {"context_length": context}
        entry = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx_delta"}
        return entry | length

    def _post(self) -> None:
        engine, path = self.response_generator, self.path
        if path in READS or path.startswith("/v1/models/"):
            raise Refused(405, f"{path[:80]} takes GET.", headers={"Allow": "GET"})
        if path not in (*CHATS, *TEXTS):
            raise Refused(404, f"There is no {path[:80]!r} here.")
        if not engine.generation_available():
            raise Refused(503, "The server's generation has ended; restart it.")
        body = normalize(read_json(self._read_body()), path in CHATS, engine.served)
        raw, unread = json.dumps(body).encode(), self.rfile
        engine.admit()
        try:
            self.headers.replace_header("Content-Length", str(len(raw)))
            self.rfile = io.BytesIO(raw)
            self._length = 0
            super().do_POST()
        finally:
            self.rfile = unread
            if self._job is not None:
                self._job.cancel()
            engine.leave()

    # mlx-lm's steps, changed.

    def handle_chat_completions(self) -> CompletionRequest:
        """The request, with its connection."""
        return self._with_connection(super().handle_chat_completions())

    def handle_text_completions(self) -> CompletionRequest:
        """The request, with its connection."""
        return self._with_connection(super().handle_text_completions())

    def _with_connection(self, request: CompletionRequest) -> Request:
        self._request = Request(**vars(request), connection=self.connection)
        return self._request

    @property
    def _job(self) -> Job | None:
        return None if self._request is None else self._request.job

    def validate_model_parameters(self) -> None:
        """As mlx-lm's; what it refuses has our form."""
        try:
            super().validate_model_parameters()
        except ValueError as error:
            raise Refused(400, f"{error}.") from error

    def generate_response(
        self, text: str, finish_reason: Any, *counts: Any, **parts: Any
    ) -> dict[str, Any]:
        """As mlx-lm's, with log probabilities in OpenAI's form and the true reason of the end.

        Text that looked like a call of a tool and could not be read is shown as it is.
        """
        job = self._job
        if job is None:
            return dict(super().generate_response(text, finish_reason, *counts, **parts))
        for lost in job.unread:
            tokenizer = self.response_generator.model_provider.tokenizer
            text += f"{tokenizer.tool_call_start}{lost}{tokenizer.tool_call_end}"
        job.unread.clear()
        if finish_reason is not None:
            finish_reason = "tool_calls" if job.called and job.reason == "stop" else job.reason
        pieces, job.spoken = job.spoken, []
        parts |= {"token_logprobs": None, "top_tokens": None}
        made = dict(super().generate_response(text, finish_reason, *counts, **parts))
        if self.logprobs and pieces:
            tokenizer = self.response_generator.model_provider.tokenizer
            made["choices"][0]["logprobs"] = (
                text_logprobs(pieces, lambda t: tokenizer.decode([t]), self._length)
                if self.object_type == "text_completion"
                else chat_logprobs(pieces, lambda t: tokenizer.decode([t]))
            )
        self._length += len(text)
        return made

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._answering = True

    def _set_cors_headers(self) -> None:
        """Nothing, unless the page's origin was allowed."""
        origin, allowed = self.headers.get("Origin"), self.response_generator.served.origins
        if origin is None or not ("*" in allowed or origin in allowed):
            return
        self.send_header("Access-Control-Allow-Origin", "*" if "*" in allowed else origin)
        self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")

    # Who may come in.

    def _check_caller(self) -> None:
        """Refuse pages of other origins, names that are not this machine's, and wrong keys."""
        served = self.response_generator.served
        self.path = self.path.partition("?")[0]
        origin = self.headers.get("Origin")
        if origin is not None and not ("*" in served.origins or origin in served.origins):
            raise Refused(
                403, f"Pages of {origin[:80]} may not use this server; see --allowed-origins."
            )
        if served.local_only and served.api_key is None and not self._is_local():
            raise Refused(
                403,
                "This server is for this machine only; --host and --api-key let others in.",
            )
        if served.api_key is None or self.path == "/health" or self.command == "OPTIONS":
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), served.api_key.encode()):
            raise Refused(
                401,
                "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_local(self) -> bool:
        """Whether the request is addressed to this machine by a name of its own."""
        name = ""
        try:
            name = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name == "localhost" or name.endswith(".localhost")

    def _body_length(self) -> int:
        """What the client says that it will send.

        Raises:
            Refused: It does not say, or too much.
        """
        given = self.headers.get("Content-Length")
        most = self.response_generator.served.max_body
        if given is None or self.headers.get("Transfer-Encoding") is not None:
            raise Refused(411, "The request needs a Content-Length.")
        if not (given.isascii() and given.isdigit()):
            raise Refused(400, f"Content-Length {given[:40]!r} is no number.")
        if len(set(self.headers.get_all("Content-Length"))) > 1:
            raise Refused(400, "The request has two Content-Lengths.")
        # Python reads numbers of so many digits only.
        if len(given.lstrip("0")) > 18 or int(given[-18:]) > most:
            raise Refused(
                413,
                f"The request's body has {given[:40]} bytes but the server takes {most}.",
                code="body_too_large",
            )
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refused(415, "The request's body must not be compressed.")
        return int(given[-18:])

    def _read_body(self) -> bytes:
        """The body, within the time that a client has.

        Raises:
            Refused: It took longer.
            ConnectionError: The client left.
        """
        left, parts = self._body_length(), []
        self._reader.begin_body()
        while left:
            try:
                part = self.rfile.read1(min(left, 1 << 16))  # type: ignore[attr-defined]
            except TimeoutError as error:
                raise Refused(408, "The request's body took too long to arrive.") from error
            if not part:
                raise ConnectionError("the client left before its request was whole")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def handle_expect_100(self) -> bool:
        """Answer a client that asks whether it may send its body."""
        try:
            self._check_caller()
            self._body_length()
        except Refused as refused:
            self.close_connection = True
            self._refuse(refused)
            return False
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    # What they are told.

    def _answer(self, work: Callable[[], None]) -> None:
        """Do a request's work, whose errors become answers."""
        self.close_connection = True
        try:
            self._check_caller()
            work()
        except Refused as refused:
            self._refuse(refused)
        except (ConnectionError, TimeoutError) as error:
            _log.info("%s: the client left (%s)", self.address_string(), error or "no reason")
        except Exception as error:
            _log.exception("%s failed", self.path)
            self._refuse(failure(error))

    def _refuse(self, refused: Refused) -> None:
        """Send an error: as an answer, or within one that has begun."""
        try:
            if self._answering:
                self.wfile.write(f"data: {json.dumps(refused.body())}\n\n".encode())
                return
            self._headers_buffer: list[bytes] = []  # a status that was written down but not sent
            self._send_json(refused.status, refused.body(), refused.headers)
            self._drain()
        except (OSError, ValueError):
            pass  # nobody is there to tell

    def _send_json(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        raw = json.dumps(body, ensure_ascii=False).encode()
        self._set_completion_headers(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _drain(self) -> None:
        """Read what the client still sends: a connection closed on it would lose the answer."""
        end, left = time.monotonic() + _DRAINING, _DRAINED
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(_DRAINING)
        while left > 0 and time.monotonic() < end:
            part = self.connection.recv(1 << 16)
            if not part:
                return
            left -= len(part)

    def end_headers(self) -> None:
        """Each connection is for one request: the end of a stream is where it closes."""
        self.send_header("Connection", "close")
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What Python's own handler refuses (a broken request line, an unknown method), as JSON."""
        self.close_connection = True
        self.headers = getattr(self, "headers", None) or {}
        if not getattr(self, "request_version", ""):
            self.request_version = "HTTP/1.0"
        self._refuse(Refused(int(code), f"{message or 'The request is not understood'}."))

    def log_message(self, format: str, *args: Any) -> None:
        """One line in the log for each answer."""
        _log.info("%s %s", self.address_string(), format % args)
