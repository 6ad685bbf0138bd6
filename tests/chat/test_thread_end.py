"""MLX's things of a thread go before the thread does."""

from __future__ import annotations

import asyncio
import threading

import mlx.core as mx
import pytest

import mlx_delta
from mlx_delta.system import thread_end
from mlx_delta.system.thread_end import cleared_with_thread


@pytest.fixture
def cleared(monkeypatch) -> list[int]:
    """The threads on which MLX's streams were cleared."""
    threads: list[int] = []
    clear = mx.clear_streams

    def noting() -> None:
        threads.append(threading.get_ident())
        clear()

    monkeypatch.setattr(mx, "clear_streams", noting)
    return threads


def in_thread(function) -> int:
    """The number of a thread that ran a function and ended."""
    thread = threading.Thread(target=function)
    thread.start()
    number = thread.ident
    thread.join()
    assert number is not None
    return number


def test_a_thread_is_cleared_once_and_before_it_is_joined(cleared):
    number = in_thread(lambda: [cleared_with_thread() for _ in range(3)])
    assert cleared == [number]


def test_the_main_thread_is_left_alone(cleared):
    cleared_with_thread()
    assert not cleared and not hasattr(thread_end._own, "guard")


@pytest.mark.parametrize("batch", [False, True], ids=["one-prompt", "batch"])
def test_whatever_generates_clears_its_thread(cleared, default, batch):
    def answer():
        if batch:
            return mlx_delta.batch_generate(*default, ["Hello"], max_tokens=2)
        return mlx_delta.generate(*default, "Hello", max_tokens=2)

    assert cleared == [in_thread(answer)]


def test_threads_of_an_event_loop_are_cleared_with_it(cleared, default):
    asyncio.run(asyncio.to_thread(mlx_delta.generate, *default, "Hello", max_tokens=2))
    assert len(cleared) == 1
