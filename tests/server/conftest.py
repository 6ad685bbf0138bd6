"""Servers of the parrot and of the demo model."""

from __future__ import annotations

import pytest

from .parrot import ParrotProvider
from .running import make_provider, running


@pytest.fixture(scope="package")
def parrot_provider(tmp_path_factory):
    return ParrotProvider(tmp_path_factory.mktemp("parrot"))


@pytest.fixture(scope="module")
def parrot(parrot_provider):
    """A server of the parrot; one for a file, so that prompts whose caches matter differ."""
    with running(parrot_provider) as server:
        yield server


@pytest.fixture(scope="package")
def demo_provider():
    return make_provider()


@pytest.fixture
def demo(demo_provider):
    """A server of the demo model, with nothing cached."""
    with running(demo_provider) as server:
        yield server
