"""Chat templates are programs of whoever made the model: what goes wrong in one is one line."""

from __future__ import annotations

import importlib
import shutil
import time

import pytest

from tests.generate.conftest import TEMPLATE, set_template

conversation = importlib.import_module("mlx_delta.generate.conversation")

LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
BROKEN = {
    "refuses": ("{{ raise_exception('only one role') }}", "only one role"),
    "syntax": ("{% for m in messages %}{{ m['content'] }", "unexpected '}'"),
    "no end": ("{% if true %}x", "Unexpected end of template"),
    "undefined": ("{{ nobody['x'] }}", "'nobody' is undefined"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "division": ("{{ 1 // 0 }}", "zero"),
    "range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "filter": ("{{ messages | nothing }}", "No filter named 'nothing'"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "5 MB": ("{{ 'x' * 5000000 }}", "makes 5000000 characters of a message of 2"),
    "endless": (LOOP, "it still runs after 2 seconds"),
}


@pytest.fixture
def with_template(chat_path, tmp_path, monkeypatch):
    monkeypatch.setattr(conversation, "TEMPLATE_SECONDS", 2)

    def make(template: str):
        path = tmp_path / "model"
        shutil.copytree(chat_path, path)
        set_template(path, template)
        return path

    return make


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_one_line(command_line, with_template, name):
    template, message = BROKEN[name]
    path, start = with_template(template), time.perf_counter()
    status, out, err = command_line("--model", path, "-p", "hi", "-m", "2")
    assert status == 1 and out == "" and time.perf_counter() - start < 60
    assert err.startswith("error: the model's chat template ") and err.count("\n") == 1
    assert message in err and "--ignore-chat-template" in err
    status, _, err = command_line(
        "--model", path, "-p", "hi", "-m", "2", "--ignore-chat-template", "--verbose", "False"
    )
    assert status == 0, err


def test_a_template_that_refuses_a_role(command_line, with_template):
    refuse = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    )
    path = with_template(refuse + TEMPLATE)
    assert command_line("--model", path, "-p", "hi", "-m", "2")[0] == 0
    status, _, err = command_line("--model", path, "-p", "hi", "-m", "2", "--system-prompt", "x")
    assert status == 1 and "No system" in err and err.count("\n") == 1


def test_a_template_that_hides_the_message(command_line, with_template, tmp_path):
    path = with_template("{% for m in messages %}{{ m['content'] | reverse }}{% endfor %}")
    file = tmp_path / "x.safetensors"
    flags = ("--model", path, "-p", "hi", "-m", "2")
    assert command_line(*flags)[0] == 0
    status, _, err = command_line(*flags, "--save-prompt-cache", file)
    assert status == 1 and "does not write the message as it is" in err and not file.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "is not JSON"), ("[]", "must be a JSON object"), ("[" * 100_000, "is not JSON")],
    ids=["cut", "a list", "deep"],
)
def test_options_of_the_template(command_line, chat_path, config, message):
    flags = ("--model", chat_path, "-p", "hi", "--chat-template-config", config)
    status, _, err = command_line(*flags)
    assert status == 1 and message in err and err.count("\n") == 1
