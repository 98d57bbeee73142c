"""Whole runs in miniature: networks are measured for their records alone, and a search for a time takes few steps."""

from collections.abc import Iterator

import pytest

from rmprune.measure import place


@pytest.fixture(scope="module", autouse=True)
def short_measuring() -> Iterator[None]:
    """6 networks in a search instead of 15: measure/test_place_budgets.py looks at the search itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "CANDIDATES", 3)
        patch.setattr(place, "ROUNDS", 2)
        yield
