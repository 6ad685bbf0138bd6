"""The messages and tools of a chat, checked and put as chat templates take them."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from .refusal import Refused

_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages whose content is text, or nothing beside calls of tools.

    ``developer``, OpenAI's new name for ``system``, becomes that again. Images are refused: the
    models read text, and mlx-lm's server would fetch whatever address a request names.

    Raises:
        Refused: The first message that is none.
    """
    if not isinstance(messages, list) or not messages:
        _refuse("messages must be a list of at least one message")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        _refuse(f"messages[{i}] must be an object with a role")
    role = "system" if message["role"] == "developer" else message["role"]
    made = {**message, "role": role, "content": _content(i, message.get("content"))}
    calls = message.get("tool_calls")
    if calls is None:
        made.pop("tool_calls", None)
    elif not isinstance(calls, list):
        _refuse(f"messages[{i}].tool_calls must be a list")
    else:
        for call in calls:
            _check_call(i, call)
    return made


def _content(i: int, content: Any) -> str | None:
    """A message's text; the parts of a list are joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(f"messages[{i}].content must be a text or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            _refuse(
                f"messages[{i}].content has a part of type {str(kind)[:40]!r}, but the model "
                "reads text only"
            )
        if not isinstance(part.get("text"), str):
            _refuse(f"messages[{i}].content has a part without a text")
        texts.append(part["text"])
    return "".join(texts)


def _check_call(i: int, call: Any) -> None:
    """A call of a tool, as an answer held it; its arguments are an object, or JSON of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _refuse(f"messages[{i}].tool_calls must hold functions with a name")
    arguments = function.get("arguments")
    try:
        known = json.loads(arguments) if isinstance(arguments, str) and arguments else arguments
    except (ValueError, RecursionError):
        _refuse(f"messages[{i}].tool_calls has arguments that are not JSON")
    if known is not None and known != "" and not isinstance(known, dict):
        _refuse(f"messages[{i}].tool_calls must have an object of arguments")


def check_tools(body: dict[str, Any]) -> None:
    """Check a chat's tools; ``tool_choice: none`` leaves them out.

    Raises:
        Refused: They are no functions, or one of them is to be called by force.
    """
    tools = body.get("tools", [])
    if not isinstance(tools, list):
        _refuse("tools must be a list", "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _refuse(f"tools[{i}] must be a function with a name", "tools")
    choice = body.pop("tool_choice", "auto")
    if choice not in ("auto", "none"):
        _refuse("tool_choice can only be 'auto' or 'none' here: no call is forced", "tool_choice")
    if choice == "none":
        body.pop("tools", None)
    roles = body.get("role_mapping")
    if roles is not None and (
        not isinstance(roles, dict) or any(not isinstance(text, str) for text in roles.values())
    ):
        _refuse("role_mapping must be an object of texts", "role_mapping")


def _refuse(message: str, param: str = "messages") -> NoReturn:
    raise Refused(400, f"{message}.", param=param)
