"""Long stages say how far they are."""

import logging

import pytest

from rmprune.runs import progress as module
from rmprune.runs.progress import duration, progress


def test_a_log_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "rmprune")
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with progress("decoding", 12) as advance:
        for _ in range(12):
            advance(1)
    assert caplog.messages == ["decoding: 3 of 12, 9 s left", "decoding: 7 of 12, 5 s left"]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 600, 9000)] == ["0 s", "59 s", "10 min", "2.5 h"]
