"""The command: what it refuses before it loads, and how it begins and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from mlx_delta.server.command import main
from mlx_delta.server.flags import KEY_VARIABLE, build_parser, check_flags

from .running import wait_for


def line_of(capsys, *flags: str) -> str:
    """The one line that the command ends with."""
    try:
        assert main([*flags]) == 1
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_a_port_in_use_is_told_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        started = time.monotonic()
        assert line_of(capsys, "--port", str(port)) == (
            f"error: [server] port {port} of 127.0.0.1 is in use; end what listens there or give "
            "--port."
        )
    assert time.monotonic() - started < 1  # before the model is loaded


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--port", "70000"], "error: --port must be from 0 to 65535 but got 70000."),
        (["--host", "192.0.2.1"], "error: [server] '192.0.2.1' is no name or address of this "),
        (["--temp", "nan"], "error: --temp must be from 0 to 100 but got nan."),
        (["--max-tokens", "0"], "error: --max-tokens must be from 1 to 2147483648 but got 0."),
        (["--max-queue", "-1"], "error: --max-queue must be from 0 to 1048576 but got -1."),
        (["--client-timeout", "0"], "error: --client-timeout must be from 1 to 3600 but got 0.0."),
        (["--api-key", " "], "error: --api-key must be of visible ASCII characters."),
        (["--no-delta", "--delta", "window=1"], "error: --no-delta and --delta window contradict "),
        (["--delta-kl", "0.1", "--delta-paper"], "error: --delta-paper and --delta-kl contradict "),
        (["--max-body", "much"], "'much' is no number of bytes; write it like 6GB or 512MB"),
        (
            ["--port", "0", "--cache-dir", ""],
            "error: [PrefixDirectory] path is empty; name a directory.",
        ),
        (
            ["--port", "0", "--cache-dir", "~nobody-here/x"],
            "error: a path begins with ~ and a name that no user has.",
        ),
        (["--chat-template-args", "[]"], "'[]' is no JSON object"),
        (["--chat-template-args", "{"], "'{' is not JSON"),
        (
            ["--model", "no/such/model", "--port", "0"],
            "error: [load] there is no model directory 'no/such",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_used_is_told_in_a_line(capsys, flags, line):
    assert line in line_of(capsys, *flags)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("4KB", 4000), ("4k", 4000), ("1.5 MiB", 3 << 19), ("4GB", 4 * 10**9)],
)
def test_sizes(text, size):
    assert build_parser().parse_args(["--max-body", text]).max_body == size


def test_a_key_comes_from_the_environment_too(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    args = build_parser().parse_args([])
    check_flags(args)
    assert args.api_key == "sesame"
    args = build_parser().parse_args(["--api-key", "other"])
    check_flags(args)
    assert args.api_key == "other"


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_which_addresses_are_local(host, local):
    args = build_parser().parse_args(["--host", host])
    check_flags(args)
    assert args.is_local is local


def test_options_that_the_delta_takes_the_place_of(capsys):
    assert line_of(capsys, "--kv-bits", "4", "--port", "0") == (
        "error: --kv-bits 4 does not go together with the delta; use --kv balanced (4.3 bits a "
        "number) or --kv small (3.3 bits a number), or --no-delta."
    )


def test_it_ends_in_good_order():
    """An answer that streams when SIGTERM comes is finished; then the process ends with 0."""
    child = subprocess.Popen(
        [sys.executable, "-m", "mlx_delta.server", "--port", "0", "--log-level", "WARNING"],
        env={**os.environ, KEY_VARIABLE: "sesame"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = child.stdout.readline().strip()
        said, _, url = line.rpartition(" ")
        assert said == "demo (the delta, context 16384) is served at"
        client = openai.OpenAI(base_url=url, api_key="sesame", max_retries=0)
        parts = client.completions.create(
            model="demo", prompt="Once upon a time", max_tokens=60, temperature=0, stream=True
        )
        texts = [next(parts).choices[0].text]
        child.send_signal(signal.SIGTERM)
        texts += [part.choices[0].text for part in parts]
        assert len(texts) > 40
        out, err = child.communicate(timeout=30)
        assert (out, err, child.returncode) == ("Stopped.\n", "", 0)
    finally:
        child.kill()
        child.wait()


def test_a_process_whose_model_was_used_in_a_thread_ends_well(parrot_provider):
    """MLX aborts a process whose threads left streams behind."""
    code = (
        "import tempfile, pathlib, mlx_delta\n"
        "from tests.server.parrot import ParrotProvider\n"
        "from tests.server.running import running\n"
        "with running(ParrotProvider(pathlib.Path(tempfile.mkdtemp()))) as server:\n"
        "    assert server.text('greet') == 'Hello, world.'\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_end_with_the_server(parrot):
    assert parrot.text("greet") == "Hello, world."
    wait_for(lambda: not any("process_request" in t.name for t in threading.enumerate()))
