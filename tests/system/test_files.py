"""Files are there whole or not at all, and stay what they were otherwise."""

from __future__ import annotations

import errno
import os
import stat
from unittest import mock

import pytest

from mlx_delta.system.files import write_whole, written_aside


def permissions(file):
    return stat.S_IMODE(file.stat().st_mode)


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "new", b"whole")
    assert (tmp_path / "new").read_bytes() == b"whole"
    assert permissions(tmp_path / "new") == permissions(tmp_path / "plain")


def test_an_old_file_keeps_its_permissions(tmp_path):
    file = tmp_path / "private"
    file.write_bytes(b"old")
    file.chmod(0o600)
    write_whole(file, b"new")
    assert (file.read_bytes(), permissions(file)) == (b"new", 0o600)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_link_to_itself_becomes_the_file(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write_whole(tmp_path / "loop", b"new")
    assert (tmp_path / "loop").read_bytes() == b"new"


def test_a_pipe_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"device or a pipe: '.*/pipe'"):
        write_whole(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_the_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/file'$"):
        write_whole(tmp_path / "no" / "file", b"new")


def test_a_file_system_without_permissions_will_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "chmod", mock.Mock(side_effect=OSError(errno.ENOTSUP, "no")))
    for name in ("file", "new"):
        write_whole(tmp_path / name, b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127], ids=["255 letters", "254 bytes"])
def test_names_as_long_as_they_may_be(tmp_path, name):
    write_whole(tmp_path / name, b"whole")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_what_fails_meanwhile_leaves_the_old_file_and_nothing_else(tmp_path, error):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(type(error)), written_aside(file, b"new"):
        raise error
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
