"""Only records that differ in their seed alone are averaged."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import fuzz
import pytest

from rmprune.config import AmcConfig, PruneConfig, SlimConfig, TrainRunConfig
from rmprune.methods.table import METHODS
from rmprune.report.comparable import incomparable
from rmprune.report.gather import gather
from rmprune.runs.records import read_record, write_record


def left_out(*paths: Path) -> str:
    """Why the records under these paths are not all reported; empty where they are."""
    return "; ".join(gather(list(paths))[1])


def test_records_that_differ_in_more_than_their_seed_are_not_averaged(runs: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"]["finetune"] = {"epochs": 3}
    write_record(path, record)
    said = left_out(runs)
    assert said.startswith(f"{runs / 's0-0.5' / 'record.json'} and {path} would be averaged as seeds of rm, ")
    assert "differ in finetune.epochs (None and 3)" in said and path not in gather([runs])[0]
    assert not left_out(path)  # one by one they can be reported


def test_settings_that_change_no_network_may_differ(runs: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"] |= {"measure": {"seconds": 9.0}, "seed": 1, "method": ["rm"]}
    record["config"] |= {"data": {"dataset": "digits", "workers": 8}, "train": {"tensorboard": True}}
    record["config"]["prune"] = {"macs_ratio": 0.5, "cuts": None}
    write_record(path, record)
    assert not left_out(runs)


def test_settings_that_may_change_in_a_run_and_where_data_lies_tell_no_records_apart(runs: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    for settings in (SlimConfig(prune=PruneConfig(macs_ratio=(0.5,))), TrainRunConfig(), AmcConfig()):
        record["config"] |= changeable(settings)
    record["config"]["data"] |= {"dataset": "digits", "data_dir": "/photos"}
    write_record(path, record)
    assert not left_out(runs)


def changeable(settings: Any) -> dict[str, Any]:
    """The settings that may change when a run goes on, as a record holds them, but those of a search, with other values."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            found |= {field.name: inner} if (inner := changeable(value)) else {}
        elif "changeable" in field.metadata and field.name != "search_minutes":
            found[field.name] = "another"
    return found


@pytest.mark.parametrize(("photos", "same"), [("a", True), ("b", False), (None, False)])
def test_photos_that_lie_elsewhere_are_the_same_by_their_digest(runs: Path, photos: str | None, same: bool) -> None:
    for path in runs.rglob("record.json"):
        record = read_record(path)
        of_one = record["seed"] == 1
        record["config"]["data"] = {"dataset": "imagefolder", "data_dir": "there" if of_one else "here"}
        write_record(path, record | ({"photos": photos if of_one else "a"} if photos else {}))
    assert left_out(runs) == "" if same else "differ in data.data_dir (here and there)" in left_out(runs)


def test_a_record_of_before_a_setting_is_one_of_its_default(runs: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"] |= {"removal": {"keep": [], "form": "auto", "fuse": "cheaper"}}
    write_record(path, record)
    assert not left_out(runs)


def test_a_search_of_so_many_minutes_is_no_usual_one(runs: Path) -> None:
    for path in runs.rglob("record.json"):
        record = read_record(path)
        record["config"] |= {"search_minutes": 1.0} if record["seed"] == 1 else {}
        write_record(path, record)
    assert not left_out(runs)
    for path in runs.rglob("record.json"):
        record = read_record(path)
        record["pruned"]["method"] = "auto"
        write_record(path, record)
    assert "averaged as seeds of auto, but differ in search_minutes" in left_out(runs)
    (runs / "config.toml").touch()  # all of one run, which went on with other minutes
    assert not left_out(runs)


def test_plain_networks_of_different_removals_are_not_averaged(runs: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["config"]["removal"] = {"keep": ["layer1.0"]}
    del record["pruned"], record["coupled"]
    write_record(path, record)
    assert "averaged as seeds of plain, but differ in removal.keep" in left_out(runs)


def test_settings_that_torch_pruning_does_not_read_may_differ(runs: Path) -> None:
    for path in runs.rglob("record.json"):
        record = read_record(path)
        record["config"]["prune"]["gradual"] = record["seed"] == 1
        del record["plain"]
        write_record(path, record)
    assert "averaged as seeds of rm, but differ in prune.gradual" in left_out(runs)
    for path in runs.rglob("record.json"):
        record = read_record(path)
        del record["pruned"]
        write_record(path, record)
    assert not left_out(runs)


def test_settings_that_a_method_does_not_read_may_differ_and_methods_say_which() -> None:
    read = {"form": "slice"}, {"form": "pair"}

    def differ(method: str, settings: tuple[dict[str, str], dict[str, str]], table: str) -> bool:
        found = [fuzz.good_record() for _ in range(2)]
        for record, own in zip(found, settings, strict=True):
            record["config"][table] = own
            record["method"], record["pruned"]["method"] = method, method
            del record["plain"]
        return bool(incomparable({Path(str(n)): record for n, record in enumerate(found)}))

    for name, method in METHODS.items():
        plain = method.start == "dense" and not (method.candidates or method.faster) and name not in ("plan", "depth")
        assert differ(name, read, "removal") != plain, name
        for setting in ("importance", "gradual", "reconstruct"):
            fixed = setting in method.settings or method.scratch or method.depth
            assert differ(name, ({setting: "a"}, {setting: "b"}), "prune") != fixed, (name, setting)
    assert differ("auto", ({"search": "a"}, {"search": "b"}), "finetune")
    bounds = {"ranges": "provable"}, {"ranges": "calibrated"}  # what was the default, and is
    found = {name for name in METHODS if not differ(name, bounds, "removal")}
    assert found >= {"residual", "depth", "mixed", "residual-collapse"} and "rm" not in found
    for table, setting, readers in (
        ("finetune", "learning_rate", {"depth", "rm"}),
        ("finetune", "epochs", {"depth", "rm", "scratch"}),
    ):
        found = {name for name in ("depth", "rm", "scratch") if differ(name, ({setting: 1}, {setting: 2}), table)}
        assert found == readers, (table, setting)


def test_budgets_in_time_that_were_counted_elsewhere_are_not_averaged(runs: Path) -> None:
    for seed, backends in ((0, ["onnxruntime", "eager"]), (1, ["eager", "onnxruntime"])):
        path = runs / f"s{seed}-0.5" / "record.json"
        record = read_record(path)
        record["config"]["measure"] = {"backends": backends, "threads": [2], "batch_sizes": [1]}
        write_record(path, record)
    assert not left_out(runs)  # in MACs it does not matter where time is measured
    for seed in (0, 1):
        path = runs / f"s{seed}-0.5" / "record.json"
        write_record(path, read_record(path) | {"budget": {"latency_ratio": 0.5}})
    assert "differ in the first of measure.backends (onnxruntime and eager)" in left_out(runs)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_may_have_a_training_and_a_split_of_its_own(runs: Path, seed: int) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["seed"] = seed  # 0 is the other record's
    record["original"]["accuracy"] -= 0.001
    record["config"] |= {"checkpoint": "dense-1", "data": {"dataset": "digits", "labels": "split1.csv"}}
    write_record(path, record)
    assert ("differ in checkpoint (None and dense-1)" in left_out(runs)) == (seed == 0)


def test_a_network_trained_in_one_run_may_be_given_to_another_of_its_seed(runs: Path) -> None:
    path = runs / "s1-0.5" / "record.json"
    record = read_record(path)
    record["seed"] = 0
    record["config"] |= {"checkpoint": "runs/s0-0.5/dense"}
    write_record(path, record)
    assert not left_out(runs)
    for auc, at in ((0.996493811111111, runs / "s0-0.5" / "record.json"), (0.9964938111111111, path)):
        again = read_record(at)
        again["original"] |= {"auc": auc}  # summed in another order
        write_record(at, again)
    assert not left_out(runs)
    record["original"]["params"] += 1
    write_record(path, record)
    assert "differ in checkpoint (None and runs/s0-0.5/dense)" in left_out(runs)


@pytest.mark.parametrize("measured", ["accuracy", "loss"])
def test_two_trainings_of_one_seed_are_two_networks_though_they_score_alike(measured: str) -> None:
    """As accuracies on few images do, and all where a loss stands in their place."""
    found = [fuzz.good_record() for _ in range(2)]
    for record, loss in zip(found, (0.5, 0.51), strict=True):
        record["config"] |= {"checkpoint": f"dense-{loss}"}
        record["original"] |= (
            {"validation": {"loss": loss}} if measured == "accuracy" else {"accuracy": None, "loss": loss}
        )
    records = {Path(str(n)): record for n, record in enumerate(found)}
    assert "differ in checkpoint (dense-0.5 and dense-0.51)" in "".join(incomparable(records).values())
    for record in found:
        record["original"] |= {"validation": {"loss": 0.5}} if measured == "accuracy" else {"loss": 0.5}
    assert not incomparable(records)
