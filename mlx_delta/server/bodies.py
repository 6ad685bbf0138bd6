"""Reading what a request asks for: each field checked, and put as mlx-lm's handler takes it.

mlx-lm checks some fields when it reads them and others when it samples, where an error ends its
server. Here all of them are checked before anything is done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from .messages import check_messages, check_tools
from .refusal import Refused
from .served import Served

# What numbers must lie between, ends included.
_BIG = 1e9
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "repetition_penalty": (0, 1000),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
WHOLE: dict[str, tuple[int, int]] = {
    "top_k": (0, 1 << 31),
    "repetition_context_size": (0, 1 << 31),
    "presence_context_size": (0, 1 << 31),
    "frequency_context_size": (0, 1 << 31),
    "top_logprobs": (0, 11),
    "seed": (-(1 << 63), (1 << 64) - 1),
}
MOST_STOPS, LONGEST_STOP = 16, 1000
# What may not be asked for, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "adapters": (),
    "audio": (),
    "modalities": (["text"],),
    "draft_model": ("default_model",),
}
# Arguments of the template's call that are the server's to choose, one of them a program.
_OWN_TEMPLATE_ARGUMENTS = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt "
    "continue_final_message tokenize padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs".split()
)


def read_json(raw: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: It is no JSON, or no object, or its text can't be UTF-8.
    """
    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_number)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # lone surrogates are no text
    except UnicodeError as error:
        raise Refused(400, "The request's body is not UTF-8 text.") from error
    except RecursionError as error:
        raise Refused(400, "The request's body is nested too deeply.") from error
    except ValueError as error:
        raise Refused(400, f"The request's body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise Refused(400, f"The request's body must be a JSON object but is {_kind(body)}.")
    return body


def normalize(body: Mapping[str, Any], chat: bool, served: Served) -> dict[str, Any]:
    """A request's fields, checked; those that are null or ask for nothing left out.

    Args:
        body: As it came.
        chat: For ``/v1/chat/completions``, and not for ``/v1/completions``.
        served: The model and the limits.

    Raises:
        Refused: The first field that is wrong.
    """
    body = {name: value for name, value in body.items() if value is not None}
    _check_model(body, served)
    for name, empty in UNSUPPORTED.items():
        value = body.pop(name, None)
        if value is not None and not any(_same(value, x) for x in empty):
            _refuse(name, f"{name}={_shown(value)} is not supported here")
    _check_format(body)
    _check_numbers(body, served)
    _check_answer_length(body, served)
    _check_stream(body)
    _check_logprobs(body, chat)
    _check_stop(body)
    _check_bias(body, served)
    if chat:
        body.pop("prompt", None)
        body["messages"] = check_messages(body.get("messages"))
        check_tools(body)
        _check_template_arguments(body)
        check_characters(sum(len(m["content"] or "") for m in body["messages"]), served)
    else:
        body["prompt"] = _check_prompt(body.get("prompt"), served)
    return body


def check_characters(count: int, served: Served) -> None:
    """Refuse a text that can't fit the context before minutes are spent on cutting it up.

    Raises:
        Refused: Even in the vocabulary's longest pieces it has more tokens than are allowed.
    """
    longest, piece = served.longest_prompt, served.longest_piece
    if longest is not None and piece is not None and count > longest * piece:
        raise Refused(
            400,
            f"The prompt has {count} characters, more than {longest} tokens can hold; shorten it.",
            code="context_length_exceeded",
        )


def _check_model(body: dict[str, Any], served: Served) -> None:
    name = body.setdefault("model", served.name)
    if not isinstance(name, str):
        _refuse("model", f"model must be a name but is {_kind(name)}")
    if served.names and name not in (*served.names, "default_model"):
        raise Refused(
            404,
            f"There is no model {_shown(name)} here; {served.name!r} is served.",
            param="model",
            code="model_not_found",
        )


def _check_format(body: dict[str, Any]) -> None:
    wanted = body.pop("response_format", None)
    if wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text"):
        return
    _refuse("response_format", "response_format can only be {'type': 'text'} here")


def _check_numbers(body: dict[str, Any], served: Served) -> None:
    for name, (least, most) in NUMBERS.items():
        if name not in body:
            continue
        value = body[name]
        if type(value) not in (int, float) or not least <= value <= most:
            _refuse(
                name, f"{name} must be a number from {least:g} to {most:g} but is {_shown(value)}"
            )
        body[name] = float(value)
    for name, bounds in WHOLE.items():
        if name in body:
            _check_whole(body, name, *bounds)
    if "num_draft_tokens" in body:
        _check_whole(body, "num_draft_tokens", 1, served.most_draft_tokens or 1 << 10)
    if "seed" in body:
        body["seed"] %= 1 << 64
    if served.vocabulary is not None and body.get("top_k", 0) >= served.vocabulary:
        body["top_k"] = 0  # all tokens: what 0 stands for


def _check_whole(body: dict[str, Any], name: str, least: int, most: int) -> None:
    value = body[name]
    if type(value) is not int or not least <= value <= most:
        bound = f"from {least} to {most}" if most < 1 << 31 or least < 0 else f">= {least}"
        _refuse(name, f"{name} must be a whole number {bound} but is {_shown(value)}")


def _check_answer_length(body: dict[str, Any], served: Served) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            _check_whole(body, name, 1, served.max_answer)


def _check_stream(body: dict[str, Any]) -> None:
    if not isinstance(body.get("stream", False), bool):
        _refuse("stream", f"stream must be true or false but is {_shown(body['stream'])}")
    options = body.pop("stream_options", None)
    if options is None:
        return
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        _refuse("stream_options", "stream_options must be an object like {'include_usage': true}")
    body["stream_options"] = {"include_usage": options.get("include_usage", False)}


def _check_logprobs(body: dict[str, Any], chat: bool) -> None:
    """Text completions ask for a number of log probabilities, chats for yes and a number."""
    value = body.get("logprobs", False)
    if not chat and type(value) is int:
        most = WHOLE["top_logprobs"][1]
        if not 0 <= value <= most:
            _refuse("logprobs", f"logprobs must be from 0 to {most} but is {value}")
        body |= {"logprobs": True, "top_logprobs": value}
    elif not isinstance(value, bool):
        _refuse("logprobs", f"logprobs must be true or false but is {_shown(value)}")
    if body.get("top_logprobs"):
        body["logprobs"] = True


def _check_stop(body: dict[str, Any]) -> None:
    words = body.get("stop", [])
    words = [words] if isinstance(words, str) else words
    if not isinstance(words, list) or any(not isinstance(word, str) for word in words):
        _refuse("stop", "stop must be a text or a list of texts")
    if len(words) > MOST_STOPS or any(len(word) > LONGEST_STOP for word in words):
        _refuse("stop", f"stop takes {MOST_STOPS} texts of {LONGEST_STOP} characters each at most")
    body["stop"] = [word for word in words if word]


def _check_bias(body: dict[str, Any], served: Served) -> None:
    bias = body.get("logit_bias", {})
    if not isinstance(bias, dict):
        _refuse("logit_bias", f"logit_bias must be an object but is {_kind(bias)}")
    for token, value in bias.items():
        known = token.isascii() and token.isdigit() and len(token) < 10
        if not known or (served.vocabulary is not None and int(token) >= served.vocabulary):
            most = "" if served.vocabulary is None else f" from 0 to {served.vocabulary - 1}"
            _refuse("logit_bias", f"logit_bias has {_shown(token)}, which is no token{most}")
        if type(value) not in (int, float) or not abs(value) <= _BIG:
            _refuse("logit_bias", f"logit_bias of token {token} must be a number")
    if not bias:
        body.pop("logit_bias", None)


def _check_template_arguments(body: dict[str, Any]) -> None:
    given = body.get("chat_template_kwargs", {})
    if not isinstance(given, dict):
        _refuse(
            "chat_template_kwargs", f"chat_template_kwargs must be an object but is {_kind(given)}"
        )
    own = sorted(_OWN_TEMPLATE_ARGUMENTS & set(given))
    if own:
        _refuse("chat_template_kwargs", f"chat_template_kwargs can't set {own[0]}")


def _check_prompt(prompt: Any, served: Served) -> str | list[int]:
    """One prompt: a text or token ids, by itself or in a list."""
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        check_characters(len(prompt), served)
    elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        most = (served.vocabulary or 1 << 31) - 1
        wrong = [token for token in prompt if not 0 <= token <= most]
        if wrong:
            _refuse("prompt", f"prompt has token {wrong[0]} but the model has 0 to {most}")
    elif isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        _refuse("prompt", f"prompt is a list of {len(prompt)}; send one in each request")
    elif prompt is None:
        _refuse("prompt", "prompt is missing")
    else:
        _refuse("prompt", f"prompt must be a text or a list of token ids but is {_kind(prompt)}")
    if not prompt:
        _refuse("prompt", "prompt is empty; give at least one token")
    return prompt


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def _refuse(name: str, message: str) -> NoReturn:
    raise Refused(400, f"{message}.", param=name)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _shown(value: Any) -> str:
    """A value as messages show it, cut short."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")
