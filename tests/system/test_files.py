"""Files are there whole or not at all, and stay what they were otherwise."""

from __future__ import annotations

import os
import stat

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
