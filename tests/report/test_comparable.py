"""Only records that differ in their seed alone are averaged."""

from pathlib import Path

import pytest

from rmprune.errors import ArtifactError
from rmprune.report.build import build_report
from rmprune.report.comparable import refuse_mixtures
from rmprune.runs.records import find_records, read_record, write_record


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
    refuse_mixtures([path])  # one by one they can be reported


def test_settings_that_change_no_network_may_differ(runs: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"] |= {"measure": {"seconds": 9.0}, "seed": 1, "method": ["rm"]}
    record["config"] |= {"data": {"dataset": "digits", "workers": 8}, "train": {"tensorboard": True}}
    record["config"]["prune"] = {"macs_ratio": 0.5, "cuts": None}
    write_record(path, record)
    refuse_mixtures(find_records([runs]))


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
    refuse_mixtures(find_records([runs]))


def test_budgets_in_time_that_were_counted_elsewhere_are_not_averaged(runs: Path, tmp_path: Path) -> None:
    for seed, backends in ((0, ["onnxruntime", "eager"]), (1, ["eager", "onnxruntime"])):
        path = runs / f"s{seed}-0.5" / "record.json"
        record = read_record(path)
        record["config"]["measure"] = {"backends": backends, "threads": [2], "batch_sizes": [1]}
        write_record(path, record)
    refuse_mixtures(find_records([runs]))  # in MACs it does not matter where time is measured
    for seed in (0, 1):
        path = runs / f"s{seed}-0.5" / "record.json"
        write_record(path, read_record(path) | {"budget": {"latency_ratio": 0.5}})
    with pytest.raises(ArtifactError, match=r"differ in the first of measure\.backends \(onnxruntime and eager\)"):
        build_report(runs, tmp_path / "time")
