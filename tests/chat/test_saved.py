"""Conversations on disk: checked when read, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest

from mlx_delta.chat import saved
from mlx_delta.chat.saved import FORMAT, Saved

MESSAGES = [
    {"role": "user", "content": "Grüße, 你好\n"},
    {"role": "assistant", "content": '"quoted" \x1b[0m'},
]
GOOD = {"format": FORMAT, "version": 1, "messages": MESSAGES, "system": None, "model": "m"}


def test_what_was_written_is_read(tmp_path):
    conversation = Saved(MESSAGES, "Be brief.", "smollm2", "key_bits=4")
    file = saved.write(tmp_path / "talk.json", conversation)
    assert saved.read(file) == conversation
    assert os.listdir(tmp_path) == ["talk.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not whole JSON"),
        (json.dumps({**GOOD, "delta": None})[:-9], "not whole JSON"),
        ("[" * 100_000, "not whole JSON"),
        ("[1, 2]", "its format is not"),
        ({**GOOD, "format": "other"}, "its format is not"),
        ({**GOOD, "version": 2}, "it is of version 2, and this program reads version 1"),
        ({**GOOD, "extra": 1}, "unknown entry 'extra'"),
        ({**GOOD, "system": 5}, "its system is no text"),
        ({**GOOD, "messages": {}}, "its messages are no list"),
        ({**GOOD, "messages": [1]}, "message 0 is not of a role and a content"),
        ({**GOOD, "messages": MESSAGES[::-1]}, "message 0 is not the user's"),
        ({**GOOD, "messages": [MESSAGES[0]] * 2}, "message 1 is not the assistant's"),
        ({**GOOD, "messages": MESSAGES[:1]}, "its last message has no answer"),
        ({**GOOD, "messages": [{"role": "user", "content": 5}] * 2}, "message 0 has no text"),
        ({**GOOD, "messages": [{"role": "user", "content": "\ud800"}]}, "message 0 has no text"),
        ({**GOOD, "system": "\udfff"}, "its system is no text"),
    ],
)
def test_what_is_no_conversation_is_refused_and_not_overwritten(tmp_path, content, message):
    file = tmp_path / "talk.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"is no conversation: .*{message}"):
        saved.read(file)
    with pytest.raises(ValueError, match="is left as it is"):
        saved.write(file, Saved())
    assert file.read_bytes() == before


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    file = saved.write(tmp_path / "talk.json", Saved(MESSAGES))
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="can't be written: No space left"):
        saved.write(file, Saved(MESSAGES * 2))
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["talk.json"]


def test_a_link_stays_one_and_a_file_keeps_its_mode(tmp_path):
    file = saved.write(tmp_path / "talk.json", Saved())
    file.chmod(0o600)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    saved.write(link, Saved(MESSAGES))
    assert link.is_symlink() and saved.read(file).messages == MESSAGES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "error"),
    [("", IsADirectoryError), ("no/such/file", FileNotFoundError), ("pipe", OSError)],
)
def test_a_path_that_is_no_files_is_named(tmp_path, name, error):
    os.mkfifo(tmp_path / "pipe")
    for call in (saved.read, lambda path: saved.write(path, Saved())):
        with pytest.raises(error):
            call(tmp_path / name)
