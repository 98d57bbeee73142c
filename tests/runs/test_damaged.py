"""Records, notes and latency tables that are damaged or made to do harm: one clear error that names the file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest

from rmprune.artifact import load
from rmprune.config import NetworkConfig
from rmprune.errors import ArtifactError
from rmprune.measure import LatencyModel
from rmprune.pipelines.convert import open_network
from rmprune.pipelines.measure import network_directory
from rmprune.runs.notes import read_notes
from rmprune.runs.reading import DEEPEST, LARGEST_JSON, parse_json
from rmprune.runs.records import read_record, write_record


def place(record: dict[str, Any]) -> dict[str, Any]:
    return record["original"]["latency"][0]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a number of 400 digits": (lambda r: r["original"].update(accuracy=10**400), "number of 401 digits"),
    "a ratio that is a text": (lambda r: place(r).update(ratio="1"), "ratio is '1'"),
    "a time that is none": (lambda r: place(r).update(median_ms=float("nan")), "median_ms is nan"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_record_is_refused(name: str, tmp_path: Path) -> None:
    record = fuzz.good_record()
    edit, words = EDITS[name]
    edit(record)
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=rf"record\.json: .*{words}"):
        read_record(tmp_path)


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    record = fuzz.good_record()
    record["[/red]"] = record["plain"]
    place(record)["backend"] = "[/red]"
    fuzz.read_and_show(write_record(tmp_path / "record.json", record))


@pytest.mark.parametrize("name", ["../x", "/x", "..", ".", "", "a/../x", "a\0b", "a\nb"])
def test_a_network_lies_in_its_run(name: str, tmp_path: Path) -> None:
    """Not where the names in a record that came from elsewhere lead to."""
    fuzz.make_artifact(tmp_path / "x", 0, [(0, 0, 0)])
    (tmp_path / "run" / "a").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="names no folder"):
        network_directory(tmp_path / "run", name)


def test_a_damaged_network_is_not_called_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "architecture.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"architecture\.json: damaged"):
        load(network_directory(tmp_path, "pruned"))
    with pytest.raises(ArtifactError, match=r"architecture\.json: damaged"):
        open_network(NetworkConfig(str(tmp_path / "pruned")))
    with pytest.raises(ArtifactError, match="'plain' is not there"):
        network_directory(tmp_path, "plain")


def test_settings_that_are_no_numbers_are_left_out_of_a_name(tmp_path: Path) -> None:
    record = fuzz.good_record()
    record["config"]["width"] = ["x"]
    fuzz.read_and_show(write_record(tmp_path / "record.json", record))


def test_a_text_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"record\.json: cannot be written"):
        write_record(tmp_path / "record.json", fuzz.good_record() | {"command": "caf\udce9"})
    assert not any(tmp_path.iterdir())


def read_times(path: Path) -> None:
    LatencyModel(cache=path)


@pytest.mark.parametrize("read", [read_record, read_notes, read_times])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10_000 + "]" * 10_000, "nested deeper"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested deeper"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": ' + "1" * 5_000 + "}", "a number of 5000 digits"),
        (" " * (LARGEST_JSON + 1), "more than"),
        ("\udcff", "utf-8"),
    ],
)
def test_json_is_refused(read: Callable[[Path], Any], text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match=rf"a\.json: damaged \(.*{words}"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("read", [read_record, read_notes, read_times])
def test_a_pipe_is_refused_unread(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match=r"a\.json: .*(not a regular file|there is no)"):
        read(tmp_path / "a.json")


def test_what_nests_as_deep_as_allowed_is_read() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(text)) == text
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json(f"[{text}]")
