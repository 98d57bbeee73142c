"""Networks are measured here for their records alone."""

from collections.abc import Iterator
from functools import partial

import pytest

from rmprune.measure import latency


@pytest.fixture(scope="module", autouse=True)
def short_measuring() -> Iterator[None]:
    """No warm-up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "timed_rounds", partial(latency.timed_rounds, warmup=0.0))
        yield
