"""The command through a pipe: answers on stdout, words of its own on stderr, status at the end."""

from __future__ import annotations

import io
import json
import sys

import pytest

from mlx_delta.chat import command
from mlx_delta.chat.command import main
from mlx_delta.chat.terminal import Terminal

DELTA = ("--delta", "block_size=8,window=16,threshold=1.0")


@pytest.fixture
def chat(capsys, monkeypatch, words_path):
    """Run the command on an input; its status, output and errors."""

    def run(text: str | bytes, *flags: str) -> tuple[int, str, str]:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        try:
            given = flags if "--model" in flags else ("--model", words_path, *DELTA, *flags)
            status = main([str(flag) for flag in ("-m", "6", *given)])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_each_line_is_answered_on_stdout_alone(chat):
    status, out, err = chat("Hello\n\nAnd then?\n")
    assert status == 0 and "\x1b" not in out + err
    assert "error" not in err and ">" not in err
    again = chat("Hello\nAnd then?")  # no line end at the end
    assert again[:2] == (0, out)


def test_an_empty_input_is_no_error(chat):
    assert chat("")[:2] == (0, "")


def test_a_message_may_have_several_lines(chat, monkeypatch):
    asked = []
    monkeypatch.setattr(
        command.Conversation, "ask", lambda self, text: asked.append(text) or iter(())
    )
    text = '"""one\n/two\n\nthree"""\nfour\\\nfive\n//six\n"""\nseven\n"""\n"""open\nend'
    status, _, err = chat(text)
    assert (status, err) == (0, "")
    assert asked == ["one\n/two\n\nthree", "four\nfive", "/six", "seven", "open\nend"]


def test_bytes_that_are_no_text_are_left_out(chat):
    status, out, err = chat(b"Hello \xff\n/stats\n")
    assert status == 1 and "error: that was not UTF-8 text; it is left out." in err
    assert "conversation: 0 tokens of 2048, 0 messages" in out


def test_a_setting_that_needs_more_than_the_cache_keeps_is_refused(chat):
    status, out, err = chat("Hello\n/setting window=64\n/setting\nMore\n", "--max-kv-size", "64")
    assert status == 1 and err.count("error") == 1
    assert "error: [DeltaConfig] max_size must be a whole number from 96" in err
    assert "window=16" in out and "window=64" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/stat5", "there is no command /stat5 (did you mean /stats"),
        ("/undo", "there is no message yet"),
        ("/edit", "there is no message yet"),
        ("/save", "give a file: /save FILE"),
        ("/save /nowhere/talk.json", "there is no directory /nowhere"),
        ("/load /nowhere/talk.json", "there is no file /nowhere/talk.json"),
        ("/load ~nobody-here/talk.json", "there is no file ~nobody-here/talk.json"),
        ("/save ~nobody-here/talk.json", "there is no directory "),
        ("/setting temp", "'temp' is not of the form NAME=VALUE"),
        ("/setting temp=hot", "temp must be a number but got 'hot'"),
        ("/setting temp=-1", "temp must be from 0 to 1000000 but got -1"),
        ("/setting max_tokens=0", "max_tokens must be positive (or -1) but got 0"),
        ("/setting tmp=1", "unknown setting 'tmp' (did you mean temp"),
        ("/setting key_bits=9", "key_bits must be between 2 and 8"),
        (
            "/setting kv=smal",
            "unknown kind 'smal' (did you mean small?); known are small, balanced",
        ),
        ("/setting kv=small,kv=exact", "kv is given twice; drop one"),
        ("/setting kv=small,key_bits=4", "kv and key_bits=4 both give key_bits; drop one"),
        ("/setting delta=off,kv=small", "delta=off and kv contradict each other; drop one"),
        ("/setting delta=maybe", "delta is on or off but got 'maybe'"),
        ("/setting delta=off,window=16", "delta=off and window=16 contradict"),
        ("/setting threshold=1.0/1.0", "threshold has 2 values but the model has 3"),
        ("word " * 3000, "no room for an answer"),
    ],
    ids=lambda x: x[:24],
)
def test_what_cannot_be_done_is_one_line_and_the_chat_goes_on(chat, line, message):
    status, out, err = chat(f"{line}\n/stats\n")
    assert status == 1 and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert message in err
    assert "conversation: 0 tokens" in out


def test_commands(chat, tmp_path):
    file = tmp_path / "talk.json"
    lines = [
        "/help", "Hello", f"/save {file}", "/system Be brief.", "/edit Hi", "/retry", "/undo",
        f"/load {file}", "/setting kv=balanced temp=0.5,top_k=3", "More", "/stats",
        "/setting delta=off", "More", "/setting delta=on", "/setting kv=small", "/reset", "/stats",
        "/quit", "unread",
    ]  # fmt: skip
    status, out, err = chat("\n".join(lines), "--seed", "1")
    assert status == 0 and "error" not in err
    assert "/setting [NAME=VALUE ...]" in out and f"saved in {file}" in out
    assert "taken back: Hi" in out and "1 message with its answer" in out
    assert "value_bits=4" in out and "temp=0.5" in out and "top_k=3" in out
    assert "key_format=codes" in out and "value_bits=3" in out
    assert "besides: 0.39 MB written out while decoding, as there is no GPU" in out
    assert "delta: off" in out and "conversation: 0 tokens of 2048, 0 messages" in out
    written = json.loads(file.read_text())
    assert [m["content"] for m in written["messages"]][0] == "Hello"


def test_a_conversation_goes_on_from_its_file(chat, tmp_path):
    file = tmp_path / "talk.json"
    _, out, _ = chat(f"Hello\nAnd then?\n/save {file}\nWhy?\n", "--system-prompt", "Be brief.")
    status, again, _ = chat("Why?\n", "--load", file)
    assert status == 0 and "2 messages with their answers" in again
    assert out.endswith(again.splitlines()[-1] + "\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temp", "-1"), "--temp must be"),
        (("--no-delta", "--delta-paper"), "--no-delta and --delta "),
        (("--max-kv-size", "32"), "max_size must be a whole number from 48"),
        (("--memory-limit", "much"), "'much' is no number of bytes"),
        (("--memory-limit", "1MB"), "--memory-limit 1 MB leaves"),
        (("--pipeline",), "--pipeline needs several Macs"),
        (("--load", "/nowhere.json"), "there is no file /nowhere.json"),
        (("--chat-template-config", "{"), "--chat-template-config is not JSON"),
        (("--model", "/nowhere"), "there is no model directory '/nowhere'"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_flags_that_cannot_be_used(chat, flags, message):
    status, out, err = chat("Hello\n", *flags)
    assert (status, out) == (1, "") and message in err and "Traceback" not in err


def test_a_draft_model_of_other_tokens_is_refused(chat, template_path):
    status, out, err = chat("Hello\n", "--draft-model", template_path)
    assert (status, out) == (1, "") and "has other tokens than the model" in err


@pytest.mark.parametrize("here", [True, False])
def test_without_a_model_the_real_one_is_used_or_named(monkeypatch, capsys, here):
    monkeypatch.setattr(command, "is_here", lambda name: here and name == "smollm2")
    assert command.choose_model(None, Terminal()) == ("smollm2" if here else "demo")
    said = capsys.readouterr().err
    assert "SmolLM2-135M-Instruct (Q4_1)" in said
    wanted = "`python -m mlx_delta.chat --model smollm2` fetches" if not here else "which is here"
    assert wanted in said
    assert command.choose_model("other", Terminal()) == "other"


def test_a_reader_that_has_gone_ends_the_chat(chat, monkeypatch):
    def closed(self, piece):
        raise BrokenPipeError

    monkeypatch.setattr(Terminal, "show", closed)
    assert chat("Hello\nunread\n")[0] == 1


def test_an_error_of_memory_is_said_and_the_chat_goes_on(chat, monkeypatch):
    def too_much(*_):
        raise MemoryError("[chat] the caches take 9.0 GB at least but this machine leaves 1.0 GB.")

    monkeypatch.setattr("mlx_delta.chat.conversation.check_memory", too_much)
    status, out, err = chat("Hello\n/stats\n")
    assert status == 1 and "error: [chat] the caches take 9.0 GB" in err
    assert "0 messages" in out
