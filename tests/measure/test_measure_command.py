"""`measure` writes accuracy in each number format into the records, and nothing else of them changes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import rmprune
from rmprune.cli import main
from rmprune.config import (
    AmcConfig,
    DataConfig,
    DeployConfig,
    MeasureConfig,
    PruneConfig,
    RemeasureConfig,
    SlimConfig,
    TrainConfig,
    TrainRunConfig,
)
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import ArtifactError, ConfigError
from rmprune.measure import backend_accuracy, calibration_images
from rmprune.measure.backends import says_what_fails
from rmprune.pipelines.deploy import run_deploy
from rmprune.pipelines.measure import dataset_of, run_measure
from rmprune.pipelines.train import run_train
from rmprune.runs.named import keep_digests
from rmprune.runs.records import read_record, write_record

QUICK = MeasureConfig(("eager",), (1,), (1,), seconds=0.0, min_rounds=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "train"
    short = TrainConfig(epochs=1)
    run_train(
        TrainRunConfig("resnet8", width=4, train=short, measure=QUICK, out=out, data=DataConfig(train_images=256)),
        command="x",
    )
    return out


@pytest.mark.long
def test_accuracy_in_int8_lands_in_the_record_beside_the_times(run: Path) -> None:
    before = read_record(run)
    config = replace(QUICK, backends=("eager", "onnxruntime-int8"), batch_sizes=(1, 2))
    (path,) = run_measure(RemeasureConfig((run,), config, profile=True))
    after, data = read_record(path), dataset_of([path])
    for name in ("original", "plain"):
        times = after[name]["latency"]
        assert [(time["backend"], time["batch_size"]) for time in times] == [
            *(("eager", 1), ("eager", 2), ("onnxruntime-int8", 1), ("onnxruntime-int8", 2))
        ]
        assert all("accuracy" not in time and time["number_format"] == "float32" for time in times[:2])
        assert all(time["number_format"] == "int8" and time["first_ms"] > 0 for time in times[2:])
        assert all(time["ratio_low"] <= time["ratio"] <= time["ratio_high"] for time in times)
        network = rmprune.load(run / ("dense" if name == "original" else name))
        images = calibration_images(data.train)
        assert times[2]["accuracy"] == backend_accuracy(network, data.test, "onnxruntime-int8", calibration=images)
    for name in ("original", "plain"):
        profile = after[name].pop("profile")
        assert (profile["threads"], profile["batch_size"]) == (1, 1)
        assert sum(row["macs"] or 0 for row in profile["layers"]) == after[name]["macs"]
        assert sum(row["share"] for row in profile["layers"]) == pytest.approx(1)
    for entry in (before, after):
        for name in ("original", "plain"):
            entry[name].pop("latency")
        entry.pop("environment")
    assert before == after


def test_a_profile_is_shown_and_goes_with_the_measuring_that_it_belongs_to(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--backend", "eager", "--batch-size", "2", "--seconds", "0", "--min-rounds", "3")
    main(("measure", str(run), *quick, "--profile"))
    printed = capsys.readouterr().out
    assert "plain, layer by layer: onnxruntime, 1 thread, batch 2" in printed and "16 to 10" in printed
    main(("measure", str(run), *quick))
    assert "layer by layer" not in capsys.readouterr().out and "profile" not in read_record(run)["plain"]


def test_runs_that_cannot_say_their_data_are_refused_for_int8_alone(run: Path, tmp_path: Path) -> None:
    record = read_record(run)
    for folder, config in (("none", {}), ("other", {"data": {"dataset": "cifar10"}})):
        write_record(tmp_path / folder / "record.json", record | {"config": config})
    with pytest.raises(ArtifactError, match="which data set its accuracy is of"):
        dataset_of([tmp_path / "none" / "record.json"])
    with pytest.raises(ArtifactError, match="one data set at a time"):
        dataset_of([run / "record.json", tmp_path / "other" / "record.json"])


def test_a_record_that_cannot_be_written_is_said_before_anything_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != run)  # root may write anywhere
    monkeypatch.setattr("rmprune.pipelines.measure.measure_latencies", None)
    with pytest.raises(ArtifactError, match=r"record\.json: cannot be written, so nothing is measured"):
        run_measure(RemeasureConfig((run,)))


def test_a_run_is_not_judged_by_other_labels_than_it_learned(run: Path, tmp_path: Path) -> None:
    labels, other = tmp_path / "a.csv", Path(shutil.copytree(run, tmp_path / "run"))
    labels.write_text("image,label\n")
    record = read_record(other)
    record["config"]["data"] |= {"dataset": "imagefolder", "data_dir": str(tmp_path), "labels": "a.csv"}
    write_record(other / "record.json", record)
    data = DataConfig(dataset="imagefolder", data_dir=tmp_path, labels=Path("a.csv"))
    keep_digests(other, TrainRunConfig(data=data))
    opened = load_dataset(DataConfig())
    assert dataset_of([other / "record.json"], lambda *_: opened) is opened
    labels.write_text("image,label,more\n")
    with pytest.raises(ConfigError, match=r"another --labels \(.*a.csv has changed .* or train on it as it is now"):
        dataset_of([other / "record.json"], lambda *_: opened)


def test_images_that_were_moved_are_named_by_a_setting_and_are_those_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, now = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "now"
    record = read_record(other)
    record["config"]["data"] |= {"dataset": "imagefolder", "data_dir": "before", "labels": "before/a.csv"}
    write_record(other / "record.json", record)
    keep_digests(other, TrainRunConfig(), photos="digest")
    opened: list[DataConfig] = []

    def load(config: DataConfig, *_: object) -> Dataset:
        opened.append(config)
        return replace(load_dataset(DataConfig()), photos="digest" if len(opened) < 3 else "another")

    for data_dir in (None, now):
        with pytest.raises(ConfigError, match=rf"before/a\.csv, do not exist in {Path.cwd()}; put them into"):
            dataset_of([other / "record.json"], load, data_dir)
    now.mkdir()
    (now / "a.csv").touch()
    monkeypatch.setattr("rmprune.pipelines.measure.dataset_of", lambda *_, data_dir: dataset_of(*_, load, data_dir))
    monkeypatch.setattr("rmprune.pipelines.measure.measure_latencies", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_measure(RemeasureConfig((other,), replace(QUICK, backends=("onnxruntime-int8",)), data_dir=now))
    monkeypatch.setattr("rmprune.pipelines.deploy.deploy", lambda run, *_, **__: run)
    run_deploy(DeployConfig(other, data_dir=now), load=load)
    with pytest.raises(ConfigError, match=rf"run on other photos \(in {now} "):
        run_deploy(DeployConfig(other, data_dir=now), load=load)
    assert {(config.data_dir, config.labels_file) for config in opened} == {(now, now / "a.csv")}


def test_settings_that_the_data_set_never_read_keep_no_run_of_before_from_being_measured(
    run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    record = read_record(other)
    record["config"]["data"] |= {"data_dir": "photos", "image_size": 300}
    write_record(other / "record.json", record)
    assert dataset_of([other / "record.json"]).num_classes == 10


def test_a_network_that_is_no_text_any_more_is_named(run: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    (damaged / "dense" / "architecture.json").write_bytes(b"\xff{}")
    with pytest.raises(ArtifactError, match=r"dense/architecture\.json: damaged"):
        run_measure(RemeasureConfig((damaged,), measure=QUICK))


def test_a_backend_that_cannot_be_had_leaves_the_record_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "record.json").read_bytes()
    with pytest.raises(ConfigError, match="GPU"):
        run_measure(RemeasureConfig((run,), replace(QUICK, backends=("cudagraph",))))
    assert (run / "record.json").read_bytes() == before and json.loads(before)


def test_int8_is_measured_and_judges_nothing() -> None:
    first = replace(QUICK, backends=("openvino-int8", "eager"))
    for config in (
        lambda: SlimConfig(measure=first, prune=PruneConfig(latency_ratio=(0.5,))),
        lambda: AmcConfig(measure=first),
    ):
        with pytest.raises(
            ConfigError, match=r"counted on the first backend, openvino-int8, .* onnxruntime,openvino-int8"
        ):
            config()
    SlimConfig(measure=replace(first, backends=("eager", "openvino-int8")), prune=PruneConfig(latency_ratio=(0.5,)))


def test_each_place_is_measured_once_and_thousands_of_threads_are_refused() -> None:
    config = MeasureConfig(("eager", "onnxruntime", "eager"), (2, 1, 2), (8, 8))
    assert (config.backends, config.threads, config.batch_sizes) == (("eager", "onnxruntime"), (2, 1), (8,))
    with pytest.raises(ConfigError, match="at most 1024"):
        MeasureConfig(threads=(1, 10000))


def test_too_large_a_batch_is_told_from_a_backend_that_cannot() -> None:
    for error, remedy in ((MemoryError(), "smaller batch size"), (ValueError("no"), "another backend")):
        with pytest.raises(ConfigError, match=remedy), says_what_fails("net", "eager"):
            raise error


@pytest.mark.long
def test_training_measures_accuracy_in_int8_too(tmp_path: Path) -> None:
    config = TrainRunConfig("resnet20", width=4, train=TrainConfig(epochs=0), out=tmp_path / "run")
    config = replace(config, measure=replace(QUICK, backends=("onnxruntime-int8",)))
    run_train(replace(config, data=DataConfig(train_images=64)), command="x")
    times = read_record(tmp_path / "run")["plain"]["latency"]
    assert times[0]["number_format"] == "int8" and 0 <= times[0]["accuracy"] <= 1
