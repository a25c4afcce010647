"""Worlds for all tests of a session: a World replaces its ranks itself whenever a run has left them unusable."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import cloudpickle
import hypothesis
import pytest

from minipar import World

# The same examples on every machine; no deadline, since a machine may be busy.
hypothesis.settings.register_profile("minipar", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("minipar")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send the functions of test files to ranks by value, so that ranks need not import pytest."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="session")
def world2() -> Iterator[World]:
    with World(2) as world:
        yield world


@pytest.fixture(scope="session")
def world4() -> Iterator[World]:
    with World(4) as world:
        yield world


@pytest.fixture(scope="session")
def world8() -> Iterator[World]:
    with World(8) as world:
        yield world


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """A world of so many ranks."""
    with ExitStack() as stack:
        yield cache(lambda ranks: stack.enter_context(World(ranks)))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ranks deadlocked sooner."""
    monkeypatch.setattr("minipar.crew.QUIET", 0.8)
    monkeypatch.setattr("minipar.crew.SURE", 0.5)
    monkeypatch.setattr("minipar.crew.LOOK", 0.1)
