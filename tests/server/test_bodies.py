"""Each field of a request: what is taken, and what is refused before anything is done."""

from __future__ import annotations

import pytest

from mlx_delta.server.bodies import normalize
from mlx_delta.server.refusal import Refused, failure
from mlx_delta.server.served import Served

SERVED = Served(
    names=("demo",), context=100, vocabulary=50, longest_piece=9, most_draft_tokens=8, max_answer=90
)
HI = [{"role": "user", "content": "hi"}]


def taken(**fields):
    return normalize({"prompt": "hi", **fields}, False, SERVED)


def taken_chat(**fields):
    return normalize({"messages": HI, **fields}, True, SERVED)


def refusal(make, **fields) -> Refused:
    with pytest.raises(Refused) as caught:
        make(**fields)
    return caught.value


def test_what_is_not_said_stays_open():
    assert taken() == {"model": "demo", "prompt": "hi", "stop": []}
    fields = dict.fromkeys(("max_tokens", "temperature", "stop", "logprobs", "n", "stream"))
    assert taken(**fields, user="me", unknown=3) == {**taken(), "user": "me", "unknown": 3}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens must be a whole number from 1 to 90 but is 0."),
        ("max_tokens", -1, "max_tokens must be a whole number from 1 to 90 but is -1."),
        ("max_tokens", 91, "max_tokens must be a whole number from 1 to 90 but is 91."),
        ("max_tokens", 1.5, "max_tokens must be a whole number from 1 to 90 but is 1.5."),
        ("max_tokens", "9", 'max_tokens must be a whole number from 1 to 90 but is "9".'),
        ("max_tokens", True, "max_tokens must be a whole number from 1 to 90 but is true."),
        ("max_completion_tokens", 0, "max_completion_tokens must be a whole number from 1 "),
        ("temperature", -0.1, "temperature must be a number from 0 to 100 but is -0.1."),
        ("temperature", 1e300, "temperature must be a number from 0 to 100 but is 1e+300."),
        ("temperature", float("nan"), "temperature must be a number from 0 to 100 but is NaN."),
        ("temperature", [1], "temperature must be a number from 0 to 100 but is [1]."),
        ("top_p", 1.1, "top_p must be a number from 0 to 1 but is 1.1."),
        ("top_k", -1, "top_k must be a whole number >= 0 but is -1."),
        ("xtc_threshold", 0.6, "xtc_threshold must be a number from 0 to 0.5 but is 0.6."),
        ("seed", 1 << 64, "seed must be a whole number from -9223372036854775808 to "),
        ("seed", 1.0, "seed must be a whole number "),
        ("num_draft_tokens", 9, "num_draft_tokens must be a whole number from 1 to 8 but is 9."),
        ("n", 2, "n=2 is not supported here."),
        ("n", True, "n=true is not supported here."),
        ("echo", True, "echo=true is not supported here."),
        ("suffix", "x", 'suffix="x" is not supported here.'),
        ("adapters", "some/where", 'adapters="some/where" is not supported here.'),
        ("draft_model", "some/model", 'draft_model="some/model" is not supported here.'),
        ("response_format", {"type": "json_object"}, "response_format can only be "),
        ("stream", "yes", 'stream must be true or false but is "yes".'),
        ("stream_options", [], "stream_options must be an object "),
        ("stream_options", {"include_usage": 1}, "stream_options must be an object "),
        ("logprobs", 12, "logprobs must be from 0 to 11 but is 12."),
        ("logprobs", "all", 'logprobs must be true or false but is "all".'),
        ("top_logprobs", 12, "top_logprobs must be a whole number from 0 to 11 but is 12."),
        ("stop", 3, "stop must be a text or a list of texts."),
        ("stop", ["a", 3], "stop must be a text or a list of texts."),
        ("stop", ["a"] * 17, "stop takes 16 texts of 1000 characters each at most."),
        ("stop", "a" * 1001, "stop takes 16 texts of 1000 characters each at most."),
        ("logit_bias", [], "logit_bias must be an object but is a list."),
        ("logit_bias", {"50": 1}, 'logit_bias has "50", which is no token from 0 to 49.'),
        ("logit_bias", {"-1": 1}, 'logit_bias has "-1", which is no token from 0 to 49.'),
        ("logit_bias", {"hi": 1}, 'logit_bias has "hi", which is no token from 0 to 49.'),
        ("logit_bias", {"1": "x"}, "logit_bias of token 1 must be a number."),
        ("model", 3, "model must be a name but is a number."),
        ("prompt", ["a", "b"], "prompt is a list of 2; send one in each request."),
        ("prompt", [[1], [2]], "prompt is a list of 2; send one in each request."),
        ("prompt", [50], "prompt has token 50 but the model has 0 to 49."),
        ("prompt", [], "prompt must be a text or a list of token ids but is a list."),
        ("prompt", "", "prompt is empty; give at least one token."),
        ("prompt", {"a": 1}, "prompt must be a text or a list of token ids but is an object."),
        ("prompt", "x" * 901, "The prompt has 901 characters, more than 100 tokens can hold; "),
    ],
)
def test_a_completions_field_is_refused(name, value, message):
    refused = refusal(taken, **{name: value})
    assert refused.status == 400 and refused.message.startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": None}, "messages must be a list of at least one message."),
        ({"messages": []}, "messages must be a list of at least one message."),
        ({"messages": ["hi"]}, "messages[0] must be an object with a role."),
        ({"messages": [{"content": "hi"}]}, "messages[0] must be an object with a role."),
        ({"messages": [*HI, {"role": "user", "content": 3}]}, "messages[1].content must be a "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content has a part of type 'image_url', but the model reads text only.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content has a part without a text.",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls must hold functions with a name.",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages[0].tool_calls has arguments that are not JSON.",
        ),
        ({"tools": {}}, "tools must be a list."),
        ({"tools": [{"type": "function"}]}, "tools[0] must be a function with a name."),
        ({"tool_choice": "required"}, "tool_choice can only be 'auto' or 'none' here: "),
        ({"role_mapping": {"user": 3}}, "role_mapping must be an object of texts."),
        ({"chat_template_kwargs": []}, "chat_template_kwargs must be an object but is a list."),
        ({"chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs can't set tokenize."),
        ({"logprobs": 3}, "logprobs must be true or false but is 3."),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_chats_field_is_refused(fields, message):
    refused = refusal(taken_chat, **fields)
    assert refused.status == 400 and refused.message.startswith(message)


def test_another_model_is_not_here():
    refused = refusal(taken, model="eagle")
    assert (refused.status, refused.code) == (404, "model_not_found")
    assert taken(model="default_model")["model"] == "default_model"
    assert normalize({"prompt": "hi", "model": "any"}, False, Served())["model"] == "any"


def test_fields_are_put_as_mlx_lm_takes_them():
    assert taken(xtc_probability=1)["xtc_probability"] == 1.0
    assert type(taken(temperature=1)["temperature"]) is float
    assert taken(seed=-1)["seed"] == (1 << 64) - 1
    assert taken(top_k=50)["top_k"] == 0  # all tokens, which mlx-lm can't sample from
    assert taken(top_k=49)["top_k"] == 49
    assert taken(stop="a")["stop"] == ["a"] and taken(stop=["", "b"])["stop"] == ["b"]
    fields = taken(logprobs=3)
    assert (fields["logprobs"], fields["top_logprobs"]) == (True, 3)
    assert taken(logprobs=0)["logprobs"] is True
    assert taken_chat(top_logprobs=2)["logprobs"] is True
    assert taken(stream_options={})["stream_options"] == {"include_usage": False}
    assert "logit_bias" not in taken(logit_bias={})


def test_messages_are_put_as_templates_take_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]
    assert taken_chat(messages=messages)["messages"] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": None},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert taken_chat(tools=tools)["tools"] == tools
    assert "tools" not in taken_chat(tools=tools, tool_choice="none")


def test_what_a_failure_is_called():
    assert failure(RuntimeError("[metal::malloc] Out of Memory")).status == 503
    assert failure(MemoryError()).body()["error"]["code"] == "out_of_memory"
    refused = failure(KeyError())
    assert (refused.status, refused.message) == (500, "The server failed: KeyError")
    assert refused.body()["error"]["type"] == "server_error"


def test_an_answers_room():
    assert SERVED.room(90, 50) == 10 and SERVED.room(100, 50) == 1 and SERVED.room(10, 50) == 50
    assert Served().room(10**6, 50) == 50
    assert SERVED.longest_prompt == 100 and Served(context=9, max_prompt=5).longest_prompt == 5
