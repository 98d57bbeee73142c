"""Figures: what is drawn, in ms or in ratios, and fronts. How methods look is test_looks.py's."""

from pathlib import Path

import pytest

from rmprune.report import frame
from rmprune.report.build import build_report
from rmprune.report.figures import accuracy_against_time, pareto_front
from rmprune.runs.records import find_records, read_record, write_record


def test_records_measured_under_different_conditions_are_drawn_by_ratios(small: Path, tmp_path: Path) -> None:
    every = frame(find_records([small]))
    assert {ax.get_xlabel() for ax in accuracy_against_time(every, "a").axes} == {"measured time for a batch (ms)"}
    assert '"apart":false' in build_report(small, tmp_path / "together")[-2].read_text()
    slow = read_record(small / "s1-0.5")
    for name in ("original", "plain", "pruned", "coupled"):
        for latency in slow[name]["latency"]:
            for time in ("median_ms", "q1_ms", "q3_ms"):
                latency[time] *= 3
    write_record(small / "s1-0.5" / "record.json", slow)
    apart = frame(find_records([small]))
    figure = accuracy_against_time(apart, "a")
    assert {ax.get_xlabel() for ax in figure.axes} == {"measured time, dense network = 1"}
    drawn = [point for points in figure.axes[0].collections for point in points.get_offsets().tolist()]
    assert any(x == pytest.approx(1) for x, _ in drawn) and all(x < 1.6 for x, _ in drawn)
    assert '"apart":true' in build_report(small, tmp_path / "apart")[-2].read_text()


def test_pareto_front() -> None:
    assert pareto_front([(1, 90), (2, 89), (3, 92), (2, 91), (4, 92)]) == [(1, 90), (2, 91), (3, 92)]
