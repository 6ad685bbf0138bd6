"""The number of BLAS threads: processors that are there, less those that are busy."""

from __future__ import annotations

import pytest

from mlx_delta.system import memory, threads


@pytest.fixture
def chosen(monkeypatch):
    """The numbers that were set, on a machine of eight idle processors without a choice made."""
    numbers: list[int] = []
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "set_blas_threads", lambda n: numbers.append(n) or True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.0, 0.0))
    monkeypatch.setattr(threads, "_quota", lambda: None)
    return numbers


@pytest.mark.parametrize(
    ("load", "quota", "expected"),
    [(0.1, None, 8), (2.6, None, 5), (7.2, None, 1), (40.0, None, 1), (0.0, 1.5, 2), (1.0, 3.0, 2)],
    ids=["idle", "partly busy", "busy", "overloaded", "quota", "quota and busy"],
)
def test_the_number_is_what_is_left(chosen, monkeypatch, load, quota, expected):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(threads, "_quota", lambda: quota)
    assert threads.choose_threads() == expected
    assert chosen == [expected]


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_who_sets_a_variable_has_chosen(chosen, monkeypatch, name):
    monkeypatch.setenv(name, "3")
    assert threads.choose_threads() is None
    assert chosen == []


@pytest.mark.parametrize(
    ("machine", "space", "container", "expected"),
    [
        (100, None, None, (100, "this machine's memory")),
        (1 << 40, 1 << 30, None, (768 << 20, "the limit on address space (ulimit -v)")),
        (1 << 40, None, 5, (5, "the container's memory limit")),
    ],
    ids=["machine", "ulimit", "container"],
)
def test_free_memory_is_the_least_bound(monkeypatch, machine, space, container, expected):
    monkeypatch.setattr(memory, "_machine_memory", lambda: machine)
    monkeypatch.setattr(memory, "_address_space", lambda: space)
    monkeypatch.setattr(memory, "_container_memory", lambda: container)
    assert memory.free_memory() == expected


def test_memory_is_found_here():
    free, limit = memory.free_memory()
    assert free > 1 << 20 and limit
