"""Figures: styles, legends and fronts."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rmprune.methods.table import METHODS
from rmprune.report import frame
from rmprune.report.build import build_report
from rmprune.report.figures import _styles, accuracy_against_time, pareto_front
from rmprune.runs.records import find_records, read_record, write_record


def test_no_two_methods_look_the_same() -> None:
    looks = _styles(["dense", "plain", *METHODS])
    assert len({(colour, marker) for colour, marker, _ in looks.values()}) == len(METHODS) + 2


@pytest.mark.parametrize("count", [3, 6, len(METHODS)])
def test_the_legend_lies_within_the_figure(count: int, runs: Path) -> None:
    data = frame(find_records([runs]))
    pruned = data[data.method == "rm"]
    named = sorted(METHODS, key=len)[-count:]
    every = pd.concat([data[data.method == "dense"], *(pruned.assign(method=name) for name in named)])
    figure = accuracy_against_time(every, "resnet20 on digits")
    FigureCanvasAgg(figure).draw()
    place = figure.legends[0].get_window_extent()
    assert place.x0 >= 0 and place.x1 <= figure.bbox.width and place.y0 >= 0


def test_records_measured_under_different_conditions_are_drawn_by_ratios(runs: Path, tmp_path: Path) -> None:
    every = frame(find_records([runs]))
    assert {ax.get_xlabel() for ax in accuracy_against_time(every, "a").axes} == {"measured time for a batch (ms)"}
    assert "do not compare" not in (build_report(runs, tmp_path / "together")[-2]).read_text()
    slow = read_record(runs / "s1-0.5")
    for name in ("original", "plain", "pruned", "coupled"):
        for latency in slow[name]["latency"]:
            for time in ("median_ms", "q1_ms", "q3_ms"):
                latency[time] *= 3
    write_record(runs / "s1-0.5" / "record.json", slow)
    apart = frame(find_records([runs]))
    figure = accuracy_against_time(apart, "a")
    assert {ax.get_xlabel() for ax in figure.axes} == {"measured time, dense network = 1"}
    drawn = [point for points in figure.axes[0].collections for point in points.get_offsets().tolist()]
    assert any(x == pytest.approx(1) for x, _ in drawn) and all(x < 1.6 for x, _ in drawn)
    assert "do not compare" in (build_report(runs, tmp_path / "apart")[-2]).read_text()


def test_pareto_front() -> None:
    assert pareto_front([(1, 90), (2, 89), (3, 92), (2, 91), (4, 92)]) == [(1, 90), (2, 91), (3, 92)]
