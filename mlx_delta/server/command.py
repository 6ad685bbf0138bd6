"""The command line: bind, load, serve, and end in good order."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_delta.measure.limit import said_of_caches
from mlx_delta.models.common import model_setting
from mlx_delta.prefixes import PrefixCache, PrefixDirectory
from mlx_delta.prefixes.prefix_cache import ALL
from mlx_delta.system.cli import run_command
from mlx_delta.system.memory import set_limit

from .engine import Engine
from .flags import build_parser, check_flags
from .listener import Listener
from .provider import Provider, caches_for, check_options, fingerprint_of, served_by

_log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    smaller = "use a smaller model, or fewer --decode-concurrency"
    return run_command(lambda: run(args), smaller)


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ValueError: A flag or a model that can't be used.
        OSError: The port can't be listened on, or a file can't be read.
        MemoryError: The model is larger than the memory.
    """
    check_flags(args)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    # Before the model is loaded: a port in use is told at once.
    with Listener(args.host, args.port, args.max_connections) as listener:
        directory = open_directory(args)
        if args.memory_limit is not None:
            set_limit(args.memory_limit)
        provider = Provider(args)
        provider.load_default()
        check_options(provider, args)
        engine = Engine(provider, make_store(provider, args, directory), served_by(provider, args))
        try:
            announce(listener, engine, args)
            with ending_on_signals(listener):
                listener.serve(engine)
                listener.server_close()  # whoever comes now is told at once
                if not engine.drain(args.grace):
                    _log.warning("answers that were not finished are cut short")
        finally:
            engine.stop_and_join()
    print("Stopped.", flush=True)


def open_directory(args: argparse.Namespace) -> PrefixDirectory | None:
    """The directory of --cache-dir.

    Raises:
        OSError: It can't be used.
    """
    if args.cache_dir is None:
        return None
    return PrefixDirectory(args.cache_dir, args.cache_budget, _log.warning)


def make_store(
    provider: Provider, args: argparse.Namespace, directory: PrefixDirectory | None = None
) -> PrefixCache:
    """The store of prompts' caches: in memory, and in a directory if there is one."""
    name = functools.cache(lambda _: fingerprint_of(provider, args))
    return PrefixCache(
        args.prompt_cache_size,
        args.prompt_cache_bytes or ALL,
        directory=directory,
        identify=name if directory is not None else lambda _: None,
        make_caches=lambda _, length: caches_for(provider, length),
    )


def announce(listener: Listener, engine: Engine, args: argparse.Namespace) -> None:
    """Say where the server is, and who may use it."""
    served, model = engine.served, engine.model_provider.model
    setting, takes = model_setting(model), said_of_caches(model)
    kind = "dense attention" if setting is None else "the delta"
    context = "" if served.context is None else f", context {served.context}"
    print(f"{served.name} ({kind}{context}{takes}) is served at {listener.url}", flush=True)
    if not args.is_local and served.api_key is None:
        print(
            f"note: whoever reaches {args.host} may use it; --api-key lets in those with a key.",
            file=sys.stderr,
        )


@contextmanager
def ending_on_signals(listener: Listener) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the serving; the second time, the process."""
    signals = (signal.SIGINT, signal.SIGTERM)
    asked = threading.Event()

    def end(*_: Any) -> None:
        if asked.is_set():
            os._exit(130)
        asked.set()
        # The serving loop waits for this call's end, and this call for the loop's.
        threading.Thread(target=listener.shutdown, daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
