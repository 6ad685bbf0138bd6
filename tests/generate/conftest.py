"""A tiny model with a chat template, and the command run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_delta.generate.command import main
from tests.tiny import write_llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def set_template(path: Path, template: str) -> None:
    """Give a model directory a chat template."""
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


@pytest.fixture(scope="package")
def chat_path(tmp_path_factory):
    path = write_llama(tmp_path_factory.mktemp("models") / "chat")
    set_template(path, TEMPLATE)
    return path


@pytest.fixture
def command_line(capsys):
    """Run the command; its status, output and errors."""

    def call(*flags: str) -> tuple[int, str, str]:
        try:
            status = main([str(flag) for flag in flags])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def run(command_line):
    """Run the command for a short answer; what it reports, and its notes."""

    def call(*flags: object) -> dict:
        status, out, err = command_line("--json", "-m", "8", *flags)
        assert status == 0, err
        return {**json.loads(out), "notes": err}

    return call
