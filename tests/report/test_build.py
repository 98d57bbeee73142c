"""Reports: figures and page are made, for each model and data set, and renewed."""

from pathlib import Path

import pandas as pd
import pytest
from record_examples import example, of_one_place

from rmprune.config import ReportConfig
from rmprune.errors import ArtifactError
from rmprune.report.build import build_report, renew_reports, run_report
from rmprune.report.search_figure import search_figure, searches
from rmprune.runs.records import read_record, write_record


@pytest.mark.long
def test_measuring_again_renews_the_report_of_the_run(small: Path) -> None:
    build_report(small, small / "report", "python -m rmprune slim")
    (small / "report" / "command.txt").write_bytes(b"python -m rmprune slim \xff\n")  # no UTF-8 any more
    path = small / "s0-0.5" / "record.json"
    for ms in (3.0, 7.0):
        record = read_record(path)
        record["pruned"]["latency"][0]["median_ms"] = ms
        write_record(path, record)
        figures = renew_reports([small, path.parent], f"python -m rmprune measure {ms}")  # the second has no report
        assert figures == [small / "report" / "accuracy-time.png"]
        assert ms in set(pd.read_csv(small / "report" / "results.csv").median_ms)
        made_by = (small / "report" / "command.txt").read_text().splitlines()
        assert made_by == ["python -m rmprune slim \ufffd", f"python -m rmprune measure {ms}"]
    assert not (path.parent / "report").exists()


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
    assert "python -m rmprune report runs" in text
    assert "resnet20 on digits" in text and "macs 0.25" in text
    assert (out / "accuracy-time.png").stat().st_size > 10_000
    assert "report runs" in (out / "command.txt").read_text()
    before = (out / "accuracy-time.svg").read_bytes()
    (out / ".index.html.01234567.tmp").write_text("half")
    build_report([runs], out, command="again")  # after one that was killed
    assert (out / "accuracy-time.svg").read_bytes() == before and not list(out.glob(".*"))


SEARCH = {
    "episodes": [{"reward": 0.1, "source": "agent"}],
    "widths": [{"group": "a", "whole": 4, "kept": 2}],
    "verified_ratio": 0.5,
}


@pytest.mark.parametrize("key", SEARCH)
def test_a_search_that_cannot_be_drawn_whole_is_left_out_of_the_figure(key: str) -> None:
    record = example()
    record["pruned"]["search"] = SEARCH
    assert list(searches(record)) == ["pruned"]
    for lacking in ({name: value for name, value in SEARCH.items() if name != key}, SEARCH | {key: None}):
        record["pruned"]["search"] = lacking
        assert search_figure(record) is None


@pytest.mark.parametrize("dataset", [None, ["x"], 7])
def test_a_record_without_the_name_of_its_data_is_drawn(dataset: object, tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", of_one_place(example(config={"model": "m", "data": {"dataset": dataset}})))
    written = build_report([tmp_path], tmp_path / "report", "report")
    assert (tmp_path / "report" / "index.html") in written


def test_the_command_names_what_it_wrote(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_report(ReportConfig(runs=(small / "s0-0.5",), out=tmp_path / "out"), command="report")
    assert capsys.readouterr().out.split() == [str(p) for p in sorted((tmp_path / "out").iterdir(), key=_order)]


def _order(path: Path) -> int:
    return ["results.csv", "accuracy-time.png", "accuracy-time.svg", "index.html", "command.txt"].index(path.name)


@pytest.mark.long
def test_one_figure_for_each_model_and_data_set(small: Path, tmp_path: Path) -> None:
    write_record(
        tmp_path / "runs" / "other" / "record.json",
        of_one_place(example(config={"model": "res/net", "dataset": "<b>"})),
    )
    names = {p.name for p in build_report([small / "s0-0.5", small / "other"], tmp_path / "out")}
    assert {"accuracy-time-resnet20-digits.png", "accuracy-time-res-net-b.png"} <= names
    assert "<b>" not in (tmp_path / "out" / "index.html").read_text()


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
