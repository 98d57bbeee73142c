"""What runs by default: tests marked `long` run where RMPRUNE_ALL_TESTS=1 asks for all, as in .ci/run, or where their file runs alone."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

ALL = os.environ.get("RMPRUNE_ALL_TESTS") == "1"


def long(*values: Any) -> Any:
    """One set of a test's parameters that runs with the long tests alone."""
    return pytest.param(*values, marks=pytest.mark.long)


def few(values: Iterable[Any], *first: Any) -> list[Any]:
    """All values of one parameter, of which those after the first argument alone run by default."""
    found = list(values)
    assert first and all(value in found for value in first), (first, found)
    return [value if value in first else long(value) for value in found]


def draws(every: int, first: int) -> int:
    """How many draws of a property: of all tests, and by default."""
    return every if ALL else first


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Long tests that nobody asked for: all were not, and what was collected is neither one file nor long tests alone."""
    found = [item for item in items if item.get_closest_marker("long") is not None]
    return [] if ALL or len(found) == len(items) or len({item.path for item in items}) == 1 else found
