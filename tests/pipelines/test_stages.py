"""What the pipelines share: one way to the dense network, one record writer; and what an interruption of `measure` says."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slim_runs  # noqa: F401  # it knows short_resnet
import torch
from filelock import FileLock, Timeout
from torch import nn

from rmprune import artifact
from rmprune.cli import main
from rmprune.config import (
    AmcConfig,
    DataConfig,
    MeasureConfig,
    PruneConfig,
    SlimConfig,
    TrainConfig,
    TrainRunConfig,
)
from rmprune.config.commands import NetworkConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import ConfigError
from rmprune.graph.tf32 import tf32
from rmprune.models import create
from rmprune.pipelines import measure
from rmprune.pipelines.convert import open_network
from rmprune.pipelines.slim import run_slim
from rmprune.pipelines.stages import at_work, dense_network, finish, make_dense, starting_network
from rmprune.runs import records
from rmprune.runs.cells import Cell
from rmprune.runs.writing import LOCK_FILE
from rmprune.training.job import Job

MEASURE = MeasureConfig(backends=("eager",), threads=(1,), batch_sizes=(1,), seconds=0.0, min_rounds=1)
DATA = DataConfig(train_images=64, batch_size=32)
NONE = TrainConfig(epochs=0)
SLIM = SlimConfig(
    model="short_resnet", width=2, data=DATA, train=NONE, finetune=NONE, measure=MEASURE,
    prune=PruneConfig(macs_ratio=(0.6,), round_to=1, reconstruct=False, importance="magnitude"),
)  # fmt: skip
RUNS = (SLIM, AmcConfig(model="short_resnet", width=2.0, data=DATA, train=NONE, measure=MEASURE))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset(DATA)


def test_the_same_settings_are_the_same_network_in_every_pipeline(data: Dataset) -> None:
    networks = [make_dense(config, data, 3) for config in (*RUNS, TrainRunConfig(model="short_resnet", width=2))]
    first = networks[0].state_dict()
    for network in networks:
        assert not network.training and network.state_dict().keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())


def test_cells_make_what_they_share_one_after_the_other(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(directory: Path, make: Any, onnx: Any) -> Path:
        with pytest.raises(Timeout):  # another process waits
            FileLock(directory.with_name(LOCK_FILE)).acquire(timeout=0)
        return directory

    monkeypatch.setattr("rmprune.pipelines.stages.stage", stage)
    job: Job[Any] = Job(replace(SLIM, out=tmp_path / "cell"), data, torch.device("cpu"), 0)
    cell = Cell(0, "macs_ratio", 0.6, tmp_path / "cell", tmp_path)
    assert starting_network(job, cell, "plain") == tmp_path / "plain"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet20", "width": 1.5}, r"resnet20: width is 1\.5, but there it is a number of channels"),
        ({"model": "preact_resnet20", "width": 0.5}, r"width is 0\.5"),
        ({"model": "repvgg", "width": 16.25}, r"width is 16\.25"),
        ({"model": "resnet20", "free": 2}, "resnet20 has no setting free; leave --free out"),
        ({"model": "resnet20", "depth": 20}, "resnet20 has no setting depth; leave --depth out"),
        ({"model": "mobilenet_v2_digits", "reserve_ratio": 0.5}, "leave --reserve-ratio out"),
        ({"model": "mobilenet_v3_small", "width": 0.5}, "mobilenet_v3_small has no setting width; leave --width out"),
    ],
)
def test_what_a_network_does_not_take_is_refused(settings: dict[str, Any], message: str, data: Dataset) -> None:
    with pytest.raises(ConfigError, match=message):
        make_dense(AmcConfig(**settings), data, 0)


def test_a_network_starts_from_weights_of_other_classes(data: Dataset, tmp_path: Path) -> None:
    torch.save(create("short_resnet", num_classes=7, in_channels=1, width=2).state_dict(), tmp_path / "a.pt")
    said: list[str] = []
    config = replace(SLIM, weights=str(tmp_path / "a.pt"))
    network = make_dense(config, data, 3, tell=said.append)
    assert torch.equal(network.conv1.weight, torch.load(tmp_path / "a.pt")["conv1.weight"])
    assert torch.equal(network.fc.weight, make_dense(config, data, 3).fc.weight)  # by the seed
    assert said == [f"starts from {tmp_path}/a.pt: the head is new: fc.weight is 7x4 there, 10x4 here"]
    with pytest.raises(ConfigError, match="both set"):
        replace(config, checkpoint=tmp_path / "a.pt")


def test_what_a_network_takes_is_honoured(data: Dataset) -> None:
    half, wide = (make_dense(AmcConfig(width=width, free=free), data, 0) for width, free in ((0.5, 1), (1.5, 2)))
    assert parameters(wide) / parameters(half) > 9
    assert parameters(make_dense(AmcConfig(width=1.5, free=2), data, 0, width=0.5)) < parameters(wide) / 5
    assert first_channels(make_dense(AmcConfig(model="resnet20", width=12.0), data, 0)) == 12
    assert first_channels(make_dense(AmcConfig(model="resnet20"), data, 0)) == 16


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def first_channels(network: nn.Module) -> int:
    return next(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d))


def test_a_width_that_is_no_number_of_channels_is_refused_before_a_file_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(("amc", "--model", "resnet20", "--width", "1.5", "--out", str(tmp_path / "run")))
    assert "width is 1.5" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("config", RUNS, ids=["slim", "amc"])
def test_one_writer_of_records(config: SlimConfig | AmcConfig, data: Dataset, tmp_path: Path) -> None:
    cell = Cell(0, "macs_ratio", 0.6, tmp_path, tmp_path)
    job = Job(config, data, torch.device("cpu"), 0)
    dense = dense_network(job, cell)
    plain = starting_network(replace(job, teacher=dense), cell, "plain")  # type: ignore[arg-type]
    removal = artifact.read_extra(tmp_path / "plain")["removal"]
    artifact.save(
        plain, tmp_path / "mine", extra={"search": {"a": 1}, "collapsed": {"b": 0.5}, "input_shape": [1, 8, 8]}
    )
    networks = {"original": dense, "plain": plain, "mine": artifact.load(tmp_path / "mine")}
    path = finish(job, cell, "python", networks, methods=["mine"], refused={"other": "it takes too long"})
    record = records.read_record(path)
    assert path == tmp_path / "record.json" and list(records.networks(record)) == list(networks)
    assert record["budget"] == {"macs_ratio": 0.6} and record["method"] == "mine" and record["removal"] == removal
    assert record["refused"] == {"other": "it takes too long"}
    assert record["config"]["data"]["train_images"] == 64 and record["input_shape"] == [1, 8, 8]
    mine = record["mine"]
    assert (mine["method"], mine["search"], mine["collapsed"]) == ("mine", {"a": 1}, {"b": 0.5})
    assert "input_shape" not in mine and "method" not in record["plain"]
    del networks["plain"]
    alone = finish(job, Cell(0, "", 0.0, tmp_path, tmp_path), "python", networks, methods=["mine"])
    assert not {"budget", "refused"} & set(records.read_record(alone)) and records.read_record(alone)["removal"] is None


def test_no_product_is_rounded_in_a_run_whatever_the_program_allows(data: Dataset, tmp_path: Path) -> None:
    """All pipelines, and the cells of a grid, work within `at_work`."""
    job = Job(SlimConfig(prune=PruneConfig(macs_ratio=(0.5,)), out=tmp_path / "run"), data, torch.device("cuda"), 0)
    with tf32(True, "cuda"):
        with at_work(job, [], ()):
            assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.long
def test_a_run_of_before_a_renaming_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings, directories and record keep the name that it began with."""
    config = replace(SLIM, width=4, method=("coupled-collapse",), out=tmp_path / "run")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rmprune.methods.slim.tune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_slim(config, command="x")
    assert "coupled-collapse" in (tmp_path / "run" / "config.toml").read_text()
    assert (tmp_path / "run" / "collapsed-residual").is_dir() and not (tmp_path / "run" / "record.json").exists()
    (path,) = run_slim(config, command="x")
    record = records.read_record(path)
    assert record["coupled-collapse"]["collapsed"] and (tmp_path / "run" / "coupled-collapse").is_dir()
    again = replace(config, method=("residual-collapse",), out=tmp_path / "new")
    assert (
        records.read_record(run_slim(again, command="x")[0])["residual-collapse"]["macs"]
        == record["coupled-collapse"]["macs"]
    )
    run_slim(replace(config, overwrite=True, method=("residual",)), command="x")
    assert not (tmp_path / "run" / "coupled-collapse").exists()  # what the run wrote was taken away


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_slim(replace(SLIM, method=("residual",), out=out), command="x")
    return out


def interrupt_measuring(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    real, written = measure.records.write_record, []

    def write(path: Path, record: dict[str, Any]) -> Path:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(path)
        return real(path, record)

    monkeypatch.setattr(measure.records, "write_record", write)


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_measure_says_which_records_changed(
    after: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [shutil.copytree(finished, tmp_path / name) for name in ("a", "b")]
    before = [(run / "record.json").read_bytes() for run in runs]
    interrupt_measuring(monkeypatch, after)
    flags = ("--backend", "eager", "--threads", "1", "--batch-size", "2", "--seconds", "0", "--min-rounds", "1")
    with pytest.raises(SystemExit) as stopped:
        main(("measure", *map(str, runs), *flags))
    changed = sum(old != (run / "record.json").read_bytes() for run, old in zip(runs, before, strict=True))
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and changed == after
    assert f"{after} of 2 records hold the new times, the others are as they were. Again: python -m" in said


def test_a_measure_interrupted_before_it_wrote_or_after_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    flags = ("--backend", "eager", "--threads", "1", "--batch-size", "2", "--seconds", "0", "--min-rounds", "1")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for patched, said in (
        ("rmprune.pipelines.measure.measure_latencies", "nothing was changed"),
        ("rmprune.report.build.show", "all records hold the new times, reports in the runs may not"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(patched, interrupted)
            main(("measure", str(run), *flags))
        assert f"interrupted; {said}. Again: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet8", 32),
        ("resnet20", 32),
        ("resnet26", 32),
        ("resnet18", 224),
        ("resnet50", 224),
        ("preact_resnet20", 32),
    ],
)
def test_networks_for_small_images_are_looked_at_on_such(name: str, size: int) -> None:
    assert open_network(NetworkConfig(name))[1].shape == (2, 3, size, size)
