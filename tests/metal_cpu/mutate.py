"""Mutations: small mistakes planted in a kernel that its tests must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from .bench import KernelSource
from .errors import KernelError

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutation:
    """Replaces text in a kernel's header or body.

    Attributes:
        name: What goes wrong; a test's id.
        old: The text to replace.
        new: What replaces it.
        occurrence: Which one to replace, from 1; 0 for all of them.
    """

    name: str
    old: str
    new: str
    occurrence: int = 1

    def __str__(self) -> str:
        return self.name

    def __call__(self, source: str) -> str:
        """Applies the mutation.

        Raises:
            ValueError: the text is not there; else a mutation could silently stop testing.
        """
        parts = source.split(self.old)
        if len(parts) - 1 < max(self.occurrence, 1):
            raise ValueError(
                f"[Mutation] {self.name}: {self.old!r} occurs {len(parts) - 1} times in the "
                f"source, occurrence {self.occurrence} was to be replaced."
            )
        if self.occurrence == 0:
            return self.new.join(parts)
        before, after = parts[: self.occurrence], parts[self.occurrence :]
        return self.old.join(before) + self.new + self.old.join(after)


def without_barrier(occurrence: int, barrier: str = BARRIER) -> Mutation:
    """The mutation that deletes the n-th barrier, from 1."""
    return Mutation(f"without-barrier-{occurrence}", barrier, "", occurrence)


def assert_caught(
    kernel: KernelSource, mutation: Mutation, test: Callable[[KernelSource], object]
) -> str:
    """Fails unless `test` passes for the kernel and fails for the mutated kernel.

    Args:
        kernel: The kernel, which is right.
        mutation: The mistake to plant.
        test: Runs a kernel and compares; fails by AssertionError or KernelError.

    Returns:
        How the mistake showed.
    """
    test(kernel)
    try:
        test(kernel.edited(mutation))
    except (AssertionError, KernelError) as error:
        return f"{type(error).__name__}: {error}"
    pytest.fail(f"the mutation '{mutation}' survived: no check notices it")
