"""MLX as it looks where there is a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import mlx.core as mx

from mlx_delta.ops.backend import CUDA, METAL


class Everything:
    """A set with everything in it: such as of kernels that have been tried."""

    def __contains__(self, _: object) -> bool:
        return True


@contextlib.contextmanager
def seems_to_have(backend: str | None) -> Iterator[None]:
    """MLX says that it has a back-end and uses it, or, with ``None``, that it has none."""
    with (
        mock.patch.object(mx.metal, "is_available", lambda: backend == METAL),
        mock.patch.object(mx.cuda, "is_available", lambda: backend == CUDA),
        mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu if backend else mx.cpu)),
    ):
        yield
