"""What a client is told when its request is not served: a status, and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_MEMORY = "out_of_memory"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(BaseException):
    """A request is refused, or can't be served to its end.

    It is no ``Exception``: mlx-lm's handler makes a 404 of each of those, and this is to pass it.

    Args:
        status: HTTP's.
        message: A sentence for whoever reads the client's log.
        param: The field of the request that it is about.
        code: A word for programs, where OpenAI has one.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def failure(error: Exception) -> Refused:
    """What to tell a client whose answer an error ended."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return Refused(503, f"The server ran out of memory: {text}", code=NO_MEMORY)
    return Refused(500, f"The server failed: {text}")
