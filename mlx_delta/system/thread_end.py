"""What MLX keeps of a thread is dropped while the thread still runs Python.

MLX keeps the functions that `mx.compile` made with the thread that called them, and frees them
when the thread is gone. They hold Python's objects, so that freeing them waits for the interpreter;
where that is ending just then, the process aborts (`terminate called without an active exception`),
its work done. Servers, `asyncio.to_thread` and executors end threads with the process.
"""

from __future__ import annotations

import threading

import mlx.core as mx


class _Guard:
    """Dropped by Python with its thread's variables, on that thread."""

    def __del__(self) -> None:
        mx.clear_streams()


_own = threading.local()


def cleared_with_thread() -> None:
    """When the calling thread ends, MLX's streams and compiled functions of it go first.

    Nothing for the main thread, with which the process ends. Once for each thread.
    """
    if threading.current_thread() is not threading.main_thread() and not hasattr(_own, "guard"):
        _own.guard = _Guard()
