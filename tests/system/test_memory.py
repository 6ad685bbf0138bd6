"""Bytes as people write them, and a limit that the process keeps to."""

from __future__ import annotations

import pytest

from mlx_delta.system import memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9),
        ("512 MiB", 512 << 20),
        ("1.5g", 15 * 10**8),
        ("4096", 4096),
        ("1 kb", 1000),
    ],
)
def test_sizes(text, size):
    assert memory.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "-1GB", "much", "1e9", "nan", "9999999999GB", "1XB"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no number of bytes; write it like 6GB"):
        memory.parse_bytes(text)


@pytest.mark.parametrize(("size", "text"), [(1.25e9, "1.2 GB"), (34e6, "34 MB"), (5, "0 MB")])
def test_sizes_in_words(size, text):
    assert memory.show_bytes(size) == text


def test_a_limit_counts_what_is_taken(monkeypatch):
    monkeypatch.setattr(memory, "taken_memory", lambda: 40)
    monkeypatch.setattr(memory, "_machine_memory", lambda: 1 << 40)
    try:
        memory.set_limit(100)
        assert memory.free_memory() == (60, "--memory-limit 0 MB")
        memory.set_limit(30)
        assert memory.free_memory()[0] == -10
    finally:
        memory.set_limit(None)
    assert memory.free_memory()[0] > 60


def test_what_is_taken_grows_with_arrays():
    import mlx.core as mx

    before = memory.taken_memory()
    array = mx.ones((64 << 20) // 4, mx.float32)
    mx.eval(array)
    assert memory.taken_memory() - before > 48 << 20
