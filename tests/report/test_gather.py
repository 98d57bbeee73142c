"""What cannot be reported is named, and the rest is reported."""

import json
import logging
from pathlib import Path

import page_records
import pytest

from rmprune.errors import ArtifactError
from rmprune.report.build import build_report
from rmprune.report.gather import gather
from rmprune.runs.records import read_record, write_record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A good run, one without a record, one of a newer schema, a damaged one, and an empty folder."""
    for name in ("good", "newer", "damaged"):
        write_record(tmp_path / name / "record.json", page_records.record(0, 0.5, ("rm",)))
    newer = json.loads((tmp_path / "newer" / "record.json").read_text()) | {"schema": 7}
    (tmp_path / "newer" / "record.json").write_text(json.dumps(newer))
    (tmp_path / "damaged" / "record.json").write_text('{"schema": 1,')
    for name in ("unfinished", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "unfinished" / "config.toml").write_text("")
    return tmp_path


def test_the_rest_is_reported(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [runs / name for name in ("good", "newer", "damaged", "unfinished", "empty", "missing")]
    with caplog.at_level(logging.WARNING, "rmprune"):
        build_report(paths, runs / "out", "report")
    page = (runs / "out" / "index.html").read_text()
    for name, words in (
        ("newer/record.json", "schema 7, this version reads 1; update rmprune or run again"),
        ("damaged/record.json", "damaged"),
        ("unfinished", "there is no record under it"),
        ("empty", "there is no record under it"),
        ("missing", "there is no record under it"),
    ):
        said = [message for message in caplog.messages if f"{runs / name}" in message]
        assert len(said) == 1 and said[0].startswith("left out: ") and words in said[0]
        assert json.dumps(said[0].removeprefix("left out: "))[1:-1] in page
    assert set(gather(paths)[0]) == {runs / "good" / "record.json"}


def test_an_unfinished_run_below_a_folder_is_named(runs: Path) -> None:
    records, left_out = gather([runs])
    assert list(records) == [runs / "good" / "record.json"]
    assert f"{runs / 'unfinished'}: there is no record.json; is the run finished?" in left_out
    (runs / "good" / "config.toml").write_text("")
    assert f"{runs / 'good'}: there is no record.json; is the run finished?" not in gather([runs])[1]


def test_nothing_at_all_is_an_error(runs: Path) -> None:
    with pytest.raises(ArtifactError, match=r"(?s)no record under it.*schema 7"):
        build_report([runs / "empty", runs / "newer"], runs / "out")
    assert not (runs / "out").exists()


def test_runs_that_cannot_be_averaged_are_left_out_one_by_one(runs: Path) -> None:
    for seed, epochs in ((1, None), (2, 3), (3, 3)):
        record = page_records.record(seed, 0.5, ("rm",))
        if epochs:
            record["config"]["finetune"] = {"epochs": epochs}
        write_record(runs / "seeds" / str(seed) / "record.json", record)
    records, left_out = gather([runs / "good", runs / "seeds"])
    assert [read_record(path)["seed"] for path in records] == [0, 1]
    assert len(left_out) == 2
    first, other = runs / "good" / "record.json", runs / "seeds" / "2" / "record.json"
    assert left_out[0] == (
        f"{first} and {other} would be averaged as seeds of rm, but differ in finetune.epochs (None and 3); "
        "report them one by one"
    )
    assert list(gather([runs / "seeds" / "2", runs / "seeds" / "3"])[1]) == []


@pytest.mark.parametrize("measure", ["eager", {"threads": 1}, {"backends": "onnxruntime"}, {"batch_sizes": 0}])
def test_a_record_whose_settings_of_measuring_are_none_is_left_out(measure: object, runs: Path) -> None:
    record = read_record(runs / "good" / "record.json")
    record["config"]["measure"], record["budget"] = measure, {"latency_ratio": 0.5}
    path = runs / "odd" / "record.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record))
    records, left_out = gather([runs / "good", runs / "odd"])
    assert list(records) == [runs / "good" / "record.json"] and len(left_out) == 1
    assert "'config' is not of the form that runs write" in left_out[0]
