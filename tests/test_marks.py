"""Long tests are left out of a run of several files, and nowhere else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import marks
import pytest


def item(file: str, *names: str) -> Any:
    return SimpleNamespace(path=Path(file), get_closest_marker=lambda name: name if name in names else None)


def test_long_tests_run_where_all_are_asked_for_or_they_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, other = item("a.py"), item("a.py", "long"), item("b.py", "long", "forks")
    for every, draws in ((False, 3), (True, 50)):
        monkeypatch.setattr(marks, "ALL", every)
        assert marks.left_out([one, two, other]) == ([] if every else [two, other])
        assert marks.left_out([one, two]) == [] == marks.left_out([two, other])
        assert marks.draws(50, 3) == draws


def test_of_few_values_the_others_are_long() -> None:
    first, *others = marks.few("abc", "a")
    assert first == "a" and [list(other.values) for other in others] == [["b"], ["c"]]
    assert all(mark.name == "long" for other in others for mark in other.marks)
    with pytest.raises(AssertionError):
        marks.few("abc", "d")  # a value that has another name now
