"""What a run shows while it trains."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_nets import CONFIG, Stop, blobs, records, tiny_net

from rmprune.errors import ArtifactError, ConfigError
from rmprune.training import fit


def test_tensorboard_needs_a_log_and_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(CONFIG, tensorboard=True)
    with pytest.raises(ConfigError, match="log"):
        fit(tiny_net(), blobs(), config, seed=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'rmprune\[all\]'"):
        fit(tiny_net(), blobs(), config, seed=0, log=tmp_path / "log.jsonl")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rmprune.training.journal._REFRESH_SECONDS", 0.0)
    fit(tiny_net(), blobs(), dataclasses.replace(CONFIG, epochs=1), seed=0, label="dense")
    shown = capsys.readouterr()
    assert "dense" in shown.err and "images/s" in shown.err and not shown.out


def test_tensorboard_is_written_beside_the_log(tmp_path: Path):
    pytest.importorskip("tensorboard")
    config = dataclasses.replace(CONFIG, tensorboard=True, epochs=1)
    fit(tiny_net(), blobs(), config, seed=0, log=tmp_path / "log.jsonl", label="dense")
    (events,) = (tmp_path / "tensorboard" / "dense").iterdir()
    assert b"dense/validation_accuracy" in events.read_bytes()


class Store:
    """A stand-in for mlflow.MlflowClient."""

    def __init__(self, down: bool = False, gone: bool = False) -> None:
        self.down, self.gone, self.told, self.ended = down, gone, [], []

    def get_experiment_by_name(self, name: str) -> None:
        if self.down:
            raise OSError("no server\nat all")

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        return SimpleNamespace(info=SimpleNamespace(run_id=(experiment, run_name)))

    def log_metric(self, run: object, key: str, value: float, step: int) -> None:
        self.told.append((run, key, step))
        if self.gone:
            raise OSError("it went away: training goes on")

    def set_terminated(self, run: object) -> None:
        self.ended.append(run)
        raise OSError("it went away: training has ended all the same")


def test_mlflow_is_told_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, file, store = dataclasses.replace(CONFIG, mlflow=True, epochs=2), tmp_path / "r" / "log.jsonl", Store()
    file.parent.mkdir()
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: store))
    fit(tiny_net(), blobs(), config, seed=0, log=file, label="dense")
    run = ("rmprune", "r dense")
    assert [told for told in store.told if told[1] == "train_loss"] == [(run, "train_loss", 1), (run, "train_loss", 2)]
    assert store.ended == [run]
    gone = Store(gone=True)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: gone))
    fit(tiny_net(), blobs(), config, seed=0, log=file.with_name("gone.jsonl"), label="dense")
    assert len(gone.told) == 1 and gone.ended == []  # it is waited for once
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: Store(down=True)))
    with pytest.raises(ConfigError, match=r"^mlflow: its store cannot be used \(no server\); set"):
        fit(tiny_net(), blobs(), config, seed=0, log=file)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        fit(tiny_net(), blobs(), config, seed=0, log=file)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"cannot be written .* choose another folder"):
        fit(tiny_net(), blobs(), CONFIG, seed=0, log=tmp_path)


def test_a_damaged_line_goes_when_training_goes_on(tmp_path: Path):
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=Stop(12), checkpoint=checkpoint, log=log)
    with log.open("ab") as file:
        file.write(b'\xff\n{"label": "other", "epoch": 9}\n{"epoch": 3, "lo')
    fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=checkpoint, log=log)
    assert [record["epoch"] for record in records(log)] == [1, 2, 9, 3]


def test_an_epoch_whose_checkpoint_never_came_stands_once_in_the_log(tmp_path: Path):
    """Killed between the first line and the first checkpoint; and two trainings without a checkpoint are two trainings."""
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "c.pt"
    log.write_text('{"label": "train", "epoch": 1, "killed": true}\n{"label": "other", "epoch": 1}\n')
    fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=checkpoint, log=log)
    assert [(record["label"], record["epoch"]) for record in records(log)] == [
        ("other", 1), ("train", 1), ("train", 2), ("train", 3),
    ]  # fmt: skip
    fit(tiny_net(), blobs(), CONFIG, seed=0, log=log)
    assert [record["epoch"] for record in records(log)] == [1, 1, 2, 3, 1, 2, 3]
