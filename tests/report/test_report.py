"""Reports: every network and measurement is a row, figures and page are made, and only records are read."""

import io
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from record_examples import example, network
from rich.console import Console

from rmprune.config import ReportConfig
from rmprune.errors import ArtifactError
from rmprune.methods.table import METHODS
from rmprune.report import frame
from rmprune.report.build import build_report, renew_reports, run_report, show
from rmprune.report.figures import _styles, accuracy_against_time, pareto_front
from rmprune.report.tables import amount, budget_of, find_setting, method_of, milliseconds, model_of, relative
from rmprune.runs.records import find_records, read_record, write_record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in (0, 1):
        for ratio in (0.5, 0.25):
            record = example(
                seed=seed,
                config={"model": {"name": "resnet20"}, "data": {"dataset": "digits"}, "prune": {"macs_ratio": ratio}},
                pruned=network(0.96 + 0.01 * seed, int(1e6 * ratio), 2 * ratio),
                coupled=network(0.95 + 0.01 * seed, int(1e6 * ratio), 2.5 * ratio),
            )
            write_record(tmp_path / "runs" / f"s{seed}-{ratio}" / "record.json", record)
    return tmp_path / "runs"


def test_measuring_again_renews_the_report_of_the_run(runs: Path) -> None:
    build_report(runs, runs / "report", "python -m rmprune slim")
    path = runs / "s0-0.5" / "record.json"
    for ms in (3.0, 7.0):
        record = read_record(path)
        record["pruned"]["latency"][0]["median_ms"] = ms
        write_record(path, record)
        figures = renew_reports([runs, path.parent], f"python -m rmprune measure {ms}")  # the second has no report
        assert figures == [runs / "report" / "accuracy-time.png"]
        assert ms in set(pd.read_csv(runs / "report" / "results.csv").median_ms)
        made_by = (runs / "report" / "command.txt").read_text().splitlines()
        assert made_by == ["python -m rmprune slim", f"python -m rmprune measure {ms}"]
    assert not (path.parent / "report").exists()


def test_a_row_for_each_network_and_measurement(runs: Path) -> None:
    data = frame(sorted(runs.rglob("record.json")))
    assert len(data) == 4 * 4 * 4
    row = data[(data.method == "coupled") & (data.seed == 1) & (data.budget == "macs 0.25")].iloc[0]
    assert (row.model, row.dataset, row.backend, row.threads, row.batch_size) == ("resnet20", "digits", "eager", 2, 1)
    assert row.median_ms == pytest.approx(0.625) and row.ratio == pytest.approx(0.3125)
    assert set(data.method) == {"dense", "plain", "rm", "coupled"}
    assert row.run.endswith("s1-0.25")


def test_means_over_seeds_are_relative_to_dense(runs: Path) -> None:
    summary = relative(frame(sorted(runs.rglob("record.json"))))
    row = summary[(summary.method == "rm") & (summary.budget == "macs 0.5") & (summary.batch_size == 1)].iloc[0]
    assert (
        row.seeds == 2 and row.accuracy == pytest.approx(0.965) and row.accuracy_spread == pytest.approx(0.01 / 2**0.5)
    )
    assert row.accuracy_change == pytest.approx(-0.5)
    assert row.macs_ratio == 0.5 and row.ratio == 0.5
    dense = summary[(summary.method == "dense") & (summary.batch_size == 1) & (summary.backend == "eager")]
    assert len(dense) == 1 and dense.iloc[0].ratio == 1


def test_a_network_that_records_share_counts_once_a_seed(runs: Path) -> None:
    for seed, accuracy in ((0, 0.97), (1, 0.99)):
        for path in runs.rglob(f"s{seed}-*/record.json"):
            record = read_record(path)
            record["original"]["accuracy"] = accuracy
            write_record(path, record)
    summary = relative(frame(find_records([runs, runs / "s0-0.5"])))
    dense = summary[(summary.method == "dense") & (summary.batch_size == 1) & (summary.backend == "eager")].iloc[0]
    assert dense.seeds == 2 and dense.accuracy_spread == pytest.approx(0.02 / 2**0.5)


def test_a_record_named_twice_counts_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    assert len(find_records([runs, Path("runs"), runs / "s0-0.5"])) == 4


def test_the_report_is_complete(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    written = build_report([runs], out, command="python -m rmprune report runs --out report")
    assert {p.name for p in written} == {
        "results.csv",
        "accuracy-time.png",
        "accuracy-time.svg",
        "index.html",
        "command.txt",
    }
    assert len(pd.read_csv(out / "results.csv")) == 64
    text = (out / "index.html").read_text()
    assert text.count("<svg") == 1 and "python -m rmprune report runs" in text and "<script" not in text
    assert "resnet20 on digits" in text and "macs 0.25" in text
    assert (out / "accuracy-time.png").stat().st_size > 10_000
    assert "report runs" in (out / "command.txt").read_text()
    before = (out / "accuracy-time.svg").read_bytes()
    build_report([runs], out, command="again")
    assert (out / "accuracy-time.svg").read_bytes() == before


def test_the_command_names_what_it_wrote(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_report(ReportConfig(runs=(runs / "s0-0.5",), out=tmp_path / "out"), command="report")
    assert capsys.readouterr().out.split() == [str(p) for p in sorted((tmp_path / "out").iterdir(), key=_order)]


def _order(path: Path) -> int:
    return ["results.csv", "accuracy-time.png", "accuracy-time.svg", "index.html", "command.txt"].index(path.name)


def test_one_figure_for_each_model_and_data_set(runs: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "runs" / "other" / "record.json", example(config={"model": "res/net", "dataset": "<b>"}))
    names = {p.name for p in build_report([runs / "s0-0.5", runs / "other"], tmp_path / "out")}
    assert {"accuracy-time-resnet20-digits.png", "accuracy-time-res-net-b.png"} <= names
    assert "<b>" not in (tmp_path / "out" / "index.html").read_text()


def test_the_screen_shows_everything_relative_to_the_original() -> None:
    stream = io.StringIO()
    show(example(), Console(file=stream, width=120))
    text = stream.getvalue()
    for words in (
        "original",
        "plain",
        "pruned",
        "coupled",
        "96.80%",
        "-0.20",
        "0.50x",
        "500 k",
        "onnxruntime, batch 32",
        "2 threads",
    ):
        assert words in text


def test_names_and_numbers() -> None:
    assert find_setting({"a": {"b": {"model": "x"}}}, "model") == "x"
    assert find_setting({"a": {}}, "model") is None
    assert budget_of(example(config={"ratio": 0.7})) == "channels 0.7"
    assert budget_of(example(config={"budget": {"latency_ratio": 0.5}, "ratio": None})) == "latency 0.5"
    assert budget_of(example(budget={"macs_ratio": 0.1})) == "macs 0.1"
    assert budget_of(example(budget={"params_ratio": 0.3})) == "params 0.3"
    wide = {"model": "mobilenet_v2_small", "free": 4}
    assert model_of(example(model="mobilenet_v2_small", config=wide)) == "mobilenet_v2_small (free 4)"
    assert model_of(example(model="mobilenet_v2_small", config=wide | {"free": 1})) == "mobilenet_v2_small"
    assert model_of(example(width=32, config={"model": "resnet20", "width": 32})) == "resnet20 (width 32)"
    asked = {"model": "repvgg", "depth": 13, "reserve_ratio": 0.5, "width": 8}
    assert model_of(example(model="repvgg", config=asked)) == "repvgg (depth 13, reserve ratio 0.5, width 8)"
    assert method_of(example(method="inner,coupled,rm", inner=network(0.9, 10, 1.0)), "pruned") == "rm"
    assert method_of(example(method="mixed-auto,mixed", mixed=network(0.9, 10, 1.0)), "mixed") == "mixed"
    record = example(method="rm-gradual,coupled-taylor", inner=network(0.9, 10, 1.0) | {"method": "inner"})
    assert [method_of(record, n) for n in ("original", "plain", "pruned", "coupled", "inner")] == [
        "dense",
        "plain",
        "rm-gradual",
        "coupled-taylor",
        "inner",
    ]
    assert [amount(v) for v in (1.814e9, 300_774_272, 12_345, 7)] == ["1.81 G", "301 M", "12.3 k", "7"]
    assert [milliseconds(v) for v in (0.4171, 1.829, 73.66, 1240.4)] == ["0.417", "1.83", "73.7", "1240"]


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


def test_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no record under it"):
        build_report([tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a valid record"):
        build_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_record(tmp_path / "record.json", example())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        build_report([tmp_path], tmp_path / "file")


def test_records_that_differ_in_more_than_their_seed_are_not_averaged(runs: Path, tmp_path: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"]["finetune"] = {"epochs": 3}
    write_record(path, record)
    with pytest.raises(
        ArtifactError, match=r"would be averaged as seeds of rm, but differ in finetune\.epochs \(None and 3\)"
    ):
        build_report(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build_report(path, tmp_path / "out")  # one by one they can be reported


def test_settings_that_change_no_network_may_differ(runs: Path, tmp_path: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"] |= {"measure": {"seconds": 9.0}, "seed": 1, "method": ["rm"]}
    record["config"] |= {"data": {"dataset": "digits", "workers": 8}, "train": {"tensorboard": True}}
    record["config"]["prune"] = {"macs_ratio": 0.5, "cuts": None}
    write_record(path, record)
    build_report(runs, tmp_path / "out")


def test_plain_networks_of_different_removals_are_not_averaged(runs: Path, tmp_path: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"]["removal"] = {"keep": ["layer1.0"]}
    del record["pruned"], record["coupled"]
    write_record(path, record)
    with pytest.raises(ArtifactError, match=r"averaged as seeds of plain, but differ in removal\.keep"):
        build_report(runs, tmp_path / "out")


def test_settings_that_torch_pruning_does_not_read_may_differ(runs: Path, tmp_path: Path) -> None:
    for path in runs.rglob("record.json"):
        record = read_record(path)
        record["config"]["prune"]["gradual"] = record["seed"] == 1
        del record["plain"]
        write_record(path, record)
    with pytest.raises(ArtifactError, match=r"averaged as seeds of rm, but differ in prune\.gradual"):
        build_report(runs, tmp_path / "out")
    for path in runs.rglob("record.json"):
        record = read_record(path)
        del record["pruned"]
        write_record(path, record)
    build_report(runs, tmp_path / "out")


def test_budgets_in_time_that_were_counted_elsewhere_are_not_averaged(runs: Path, tmp_path: Path) -> None:
    for seed, backends in ((0, ["onnxruntime", "eager"]), (1, ["eager", "onnxruntime"])):
        path = runs / f"s{seed}-0.5" / "record.json"
        record = read_record(path)
        record["config"]["measure"] = {"backends": backends, "threads": [2], "batch_sizes": [1]}
        write_record(path, record)
    build_report(runs, tmp_path / "macs")  # in MACs it does not matter where time is measured
    for seed in (0, 1):
        path = runs / f"s{seed}-0.5" / "record.json"
        write_record(path, read_record(path) | {"budget": {"latency_ratio": 0.5}})
    with pytest.raises(ArtifactError, match=r"differ in the first of measure\.backends \(onnxruntime and eager\)"):
        build_report(runs, tmp_path / "time")
