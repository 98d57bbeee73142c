"""Records: what is written reads back, what is wrong is named, nothing is half-written; the logs of a run are repeated."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_examples import example, network

from rmprune.errors import ArtifactError
from rmprune.measure.machine import environment
from rmprune.runs.records import check_record, find_records, networks, read_record, training_log, write_record


def test_there_and_back(tmp_path: Path) -> None:
    record = example(config={"out": tmp_path, "ratio": np.float32(0.5)})
    path = write_record(tmp_path / "run" / "record.json", record)
    back = read_record(path)
    assert back == read_record(tmp_path / "run")
    assert back["config"] == {"out": str(tmp_path), "ratio": 0.5}
    assert {k: v for k, v in back.items() if k != "config"} == {k: v for k, v in record.items() if k != "config"}
    (tmp_path / "run" / "record-before.json").write_text(path.read_text())  # a copy that somebody keeps
    assert find_records([tmp_path]) == [path]


def test_networks_come_in_order_and_others_count() -> None:
    record = example(uniform=network(0.9, 400_000, 0.8))
    shuffled = dict(reversed(record.items()))
    assert list(networks(shuffled)) == ["original", "plain", "pruned", "coupled", "uniform"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["seed"], None, "'seed'"),
        (["seed"], True, "'seed'"),
        (["command"], ..., "'command'"),
        (["schema"], 7, "schema 7"),
        (["environment"], {}, "'versions'"),
        (["removal"], {"removed": []}, "'kept'"),
        (["original"], {}, "'original'"),
        (["refused"], ["inner"], "'refused'"),
        (["refused"], None, "'refused'"),
        (["refused"], {"inner": 3}, "'refused'"),
        (["training"], {"dense": "well"}, "'training' is not of the form"),
        (["budget"], {"macs_ratio": "half"}, "'budget'"),
        (["environment", "versions"], 7, "'versions'"),
        (["original", "layers"], [{"name": 1}], "original: 'layers'"),
        (["original", "layers"], [{"name": "conv", "cout": 8, "kernel": [3, 3]}], "original: 'layers'"),
        (["original", "layers"], [3], "original: 'layers'"),
        (
            ["original", "layers"],
            [{"name": "conv", "cout": 8, "kernel": [3, 3], "size": [8, 8], "groups": 1, "stride": []}],
            "original: 'layers'",
        ),
        (["pruned", "profile"], {"backend": "onnxruntime"}, "pruned: 'profile'"),
        (
            ["pruned"],
            {"accuracy": None, "loss": 1.0, "macs": 1, "params": 1, "latency": []},
            "where 'original' has the other",
        ),
        (["original", "search"], {"episodes": [{"reward": 1.0}]}, "original: 'search'"),
        (["original", "collapsed"], {"layer1.0": True}, "original: 'collapsed'"),
        (["original", "latency", 0, "accuracy"], 7.5, "latency 0: 'accuracy'"),
        (["pruned", "accuracy"], 97.0, "from 0 to 1"),
        (["pruned", "accuracy"], ..., "'pruned' lacks"),
        (["pruned", "macs"], 1.5, "macs is 1.5"),
        (["plain", "latency", 1, "median_ms"], -1, "median_ms"),
        (["plain", "latency", 0, "backend"], None, "'backend'"),
        (["plain", "latency", 0, "threads"], 0, "threads is 0"),
    ],
)
def test_the_first_wrong_field_is_named(path: list, value: Any, words: str, tmp_path: Path) -> None:
    record = copy.deepcopy(example())
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ArtifactError, match=words):
        check_record(record)
    with pytest.raises(ArtifactError, match="not written"):
        write_record(tmp_path / "record.json", record)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=f"record.json: not a valid record.*{words}"):
        read_record(tmp_path)


def test_missing_damaged_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is the run finished"):
        read_record(tmp_path)
    with pytest.raises(ArtifactError, match="no record under it"):
        find_records([tmp_path])
    (tmp_path / "record.json").write_text('{"schema": 1,')
    with pytest.raises(ArtifactError, match="damaged"):
        read_record(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_record(tmp_path / "file" / "record.json", example())
    with pytest.raises(ArtifactError, match="as JSON"):
        write_record(tmp_path / "r.json", example(config={"x": float("nan")}))


def test_environment_says_what_times_depend_on() -> None:
    here = environment()
    assert here["versions"]["torch"] and here["processor"] and here["threads"] >= 1 and here["cores"] >= 1
    json.dumps(here)


def test_the_logs_of_a_cell_and_of_what_it_shares_are_one(tmp_path: Path) -> None:
    shared, cell = tmp_path, tmp_path / "macs_ratio-0.5"
    cell.mkdir()
    for folder, label, epochs in ((shared, "dense", 2), (cell, "rm", 1)):
        lines = [{"label": label, "epoch": epoch + 1, "validation_accuracy": 0.5} for epoch in range(epochs)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dense = [{"epoch": 1, "validation_accuracy": 0.5}, {"epoch": 2, "validation_accuracy": 0.5}]
    assert training_log(shared, cell) == {"dense": dense, "rm": dense[:1]}
    assert training_log(shared, shared) == {"dense": dense}  # with one budget the cell is the run itself
    assert training_log(tmp_path / "nothing") == {}


def test_an_interrupted_log_is_read(tmp_path: Path) -> None:
    epochs = [{"label": "dense", "epoch": 1, "train_loss": 2.0}, {"label": "dense", "epoch": 1, "train_loss": 1.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs) + '{"label": "de')
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'\n\xff\xfe\n[]\n5\n{"label": "dense"}\n')
    assert training_log(tmp_path) == {"dense": [{"epoch": 1, "train_loss": 1.5}]}
