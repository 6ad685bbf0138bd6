"""One thread for everything that is done with a model.

MLX computes later than it is told to, on streams that belong to a thread: an array that was not
evaluated on the thread that made it can't be evaluated on another, and an answer that one thread
began another can't end. So a program with several threads, or an event loop, leaves the model to
one of them and hands over text.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ModelThread:
    """A thread that runs one function after another.

    What a function returns crosses to the caller's thread: texts and numbers may, and arrays only
    once they are evaluated.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._closed = False
        self._thread.start()

    def __enter__(self) -> ModelThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Run a function on the thread when those before it are done.

        Raises:
            RuntimeError: The thread was closed.
        """
        if self._closed:
            raise RuntimeError("[ModelThread] it was closed.")
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args))
            except BaseException as error:  # noqa: B036 (raised again where the result is asked for)
                future.set_exception(error)

        self._work.put(run)
        return future

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function on the thread and wait for what it returns."""
        return self.submit(function, *args).result()

    def stream(self, make: Callable[[], Iterator[T]], each: Callable[[T], object]) -> Streaming[T]:
        """Run a generator to its end on the thread.

        Args:
            make: Makes the generator; called on the thread.
            each: Called on the thread with each item, to hand it on
                (``loop.call_soon_threadsafe``, a queue's ``put``).
        """
        streaming: Streaming[T] = Streaming(make, each)
        streaming.done = self.submit(streaming.work)
        return streaming

    def close(self) -> None:
        """End the thread when what was asked for is done."""
        if not self._closed:
            self._closed = True
            self._work.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class Streaming(Generic[T]):
    """A generator that runs on a model's thread.

    Attributes:
        done: The result of its running: whether it came to its end by itself.
    """

    done: Future[bool]

    def __init__(self, make: Callable[[], Iterator[T]], each: Callable[[T], object]):
        self._make = make
        self._each = each
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Close the generator after its next item, or never begin it. From any thread."""
        self._cancelled.set()

    def work(self) -> bool:
        """Run it; on the model's thread."""
        if self._cancelled.is_set():
            return False
        items = self._make()
        try:
            for item in items:
                if self._cancelled.is_set():
                    return False
                self._each(item)
        finally:
            # On this thread: a generator that is left to another's garbage collection can't end.
            close = getattr(items, "close", None)
            if close is not None:
                close()
        return not self._cancelled.is_set()
