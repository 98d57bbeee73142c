"""The page as text: whole in one file, small, and nothing of a record is markup."""

import json
import re
import tomllib
from pathlib import Path

import page_records
import pytest

from rmprune.report import page as pages
from rmprune.report.gather import gather
from rmprune.report.payload import payload
from rmprune.report.tables import frame_of
from rmprune.runs.records import write_record

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def page_of(runs: Path, command: str = "report") -> str:
    """The page of the runs under a folder, without the figures beside it."""
    records, left_out = gather([runs])
    return pages.page(payload(frame_of(records), records, left_out, command))


def test_nothing_of_a_record_is_markup(tmp_path: Path) -> None:
    text = page_of(page_records.write_runs(tmp_path / "runs"), f"report {page_records.HOSTILE}")
    assert "window.hacked" in text and "<img" not in text
    found = DATA.findall(text)
    assert len(found) == 1 and "<" not in found[0]
    assert page_records.HOSTILE in [method["name"] for method in json.loads(found[0])["methods"]]
    assert text.count("<script>") == 3 and "default-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", DATA.sub("", text))


def test_numbers_that_json_has_not_do_not_stop_the_page() -> None:
    text = pages.page({"groups": ["<i> & {{data}}"], "error": float("nan"), "times": [float("inf"), 1.5]})
    assert json.loads(DATA.findall(text)[0]) == {"groups": ["<i> & {{data}}"], "error": None, "times": [None, 1.5]}
    assert "<title>rmprune: &lt;i&gt; &amp; {{data}}</title>" in text


@pytest.mark.long
def test_fifty_runs_stay_under_two_megabytes(tmp_path: Path) -> None:
    for seed in range(50):
        record = page_records.record(seed, 0.5, page_records.METHODS)
        for place, network in enumerate(record.values()):  # eleven networks a run, of as many layers as MobileNetV2 has
            if isinstance(network, dict) and "layers" in network:
                network["profile"] = record["pruned"]["profile"] | {"layers": 8 * page_records.PROFILE}
                network["layers"] = [page_records.layer(f"features.{n}.conv.{place}", n, 100 + seed) for n in range(53)]
        record["inner"]["search"]["episodes"] = [{"reward": 0.1234567 + e, "source": "agent"} for e in range(300)]
        write_record(tmp_path / "runs" / str(seed) / "record.json", record)
    text = page_of(tmp_path / "runs")
    assert len(text) < 2_000_000 and '"profile":' not in text and "over 4000 rows; report fewer runs" in text
    assert '"profile":' in page_of(tmp_path / "runs" / "0")


def test_points_are_means_over_seeds_and_name_their_networks(tmp_path: Path) -> None:
    data = json.loads(DATA.findall(page_of(page_records.write_runs(tmp_path / "runs")))[0])
    group = data["groups"].index("resnet20 on digits")
    place = data["places"].index({"backend": "onnxruntime", "device": "cpu", "threads": 2, "batch_size": 32})
    found = [
        p
        for p in data["points"]
        if (p["group"], p["place"], p["method"], p["budget"]) == (group, place, "rm", "macs 0.5")
    ]
    assert len(found) == 1
    assert (found[0]["accuracy_low"], found[0]["accuracy_high"], found[0]["seeds"]) == (0.965, 0.969, 2)
    networks = [data["networks"][number] for number in found[0]["networks"]]
    assert [network["seed"] for network in networks] == [0, 1] and all(n["method"] == "rm" for n in networks)
    assert networks[0]["removal"]["kept"] == {"layer2.0": "its shortcut samples another grid"}
    assert data["runs"][networks[1]["run"]]["name"].endswith("seed1/macs_ratio-0.5")
    assert networks[0]["widths"] == [8] * 7 + [10]
    assert data["skeletons"][networks[0]["skeleton"]]["layers"][0] == ["conv1", "3x3 convolution, 8x8"]
    assert len({(method["colour"], method["marker"]) for method in data["methods"]}) == len(data["methods"])


def test_a_number_format_is_a_switch_of_its_own_with_its_own_accuracy(tmp_path: Path) -> None:
    record = page_records.record(0, 0.5, ["rm"])
    page_records.add_int8(record["original"], record["pruned"])
    write_record(tmp_path / "run" / "record.json", record)
    data = json.loads(DATA.findall(page_of(tmp_path / "run"))[0])
    whole = {"backend": "onnxruntime", "device": "cpu", "threads": 2, "batch_size": 32}
    places = [data["places"].index(place) for place in (whole, whole | {"number_format": "int8"})]
    exact, coarse = ({p["method"]: p["accuracy"] for p in data["points"] if p["place"] == place} for place in places)
    assert {method: round(exact[method] - accuracy, 6) for method, accuracy in coarse.items()} == {
        "dense": 0.25,
        "rm": 0.25,
    }


def test_what_the_page_is_made_of_is_package_data() -> None:
    room = Path(pages.__file__).parent
    settings = tomllib.loads((room.parents[1] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["rmprune.report"]
    shipped = {path for pattern in patterns for path in room.glob(pattern)}
    files = {path for path in room.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == shipped and len(files) == 6
