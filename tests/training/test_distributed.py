"""Several processes train like one."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from together_processes import on_processes
from torch import nn
from training_nets import Stop, blobs, records, tiny_net

from rmprune.config import DataConfig, TrainConfig
from rmprune.errors import ConfigError
from rmprune.pruning import Budget, GradualPruner
from rmprune.training import fit
from rmprune.training.distributed import check_batch, check_device, process_group, share_state

pytestmark = pytest.mark.forks
CONFIG = TrainConfig(
    epochs=2, precision="float32", learning_rate=0.02, sync_batch_norm=True, distillation=0.3, checkpoint_seconds=1e-9
)
DATA = dataclasses.replace(blobs(DataConfig(batch_size=15)), class_weights=torch.tensor([1.0, 3.0]))
"""Batches of 8 and 7 images for two processes, in which the classes have other shares."""


def train(out: Path, rank: int = 0, stop: int | None = None) -> nn.Module:
    """In float64, where two processes differ from one by rounding alone, with a cut after the fifth step."""
    net = tiny_net(0.0).double()
    hook = GradualPruner(net, torch.zeros(1, 1, 8, 8).double(), Budget(macs_ratio=0.8), prune_epochs=1.0, every=5)
    with_stop = hook if stop is None else Stopped(stop, hook)
    found = fit(net, DATA, CONFIG, seed=0, hook=with_stop, teacher=net, checkpoint=out / "c.pt", log=out / "log.jsonl")
    torch.save(found.state_dict(), out / f"rank{rank}.pt")
    return found


class Stopped(Stop):
    """A hook with the state of the one within."""

    def state_dict(self) -> object:
        return self.inner.state_dict()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    train(out)
    return out


def compare(out: Path, alone: Path, ranks: int) -> None:
    expected = torch.load(alone / "rank0.pt")
    assert expected["0.weight"].shape != tiny_net().state_dict()["0.weight"].shape  # the cut was made
    for rank in range(ranks):
        found = torch.load(out / f"rank{rank}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6)  # the loss is float32's
    for one, other in zip(records(alone / "log.jsonl"), records(out / "log.jsonl"), strict=True):
        for fact in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            assert one[fact] == pytest.approx(other[fact], abs=1e-6)


def test_two_processes_train_like_one(alone: Path, tmp_path: Path) -> None:
    assert on_processes(lambda rank: train(tmp_path, rank), tmp_path) == [0, 0], (tmp_path / "0.txt").read_text()
    compare(tmp_path, alone, 2)


def test_batch_norms_of_ones_own_images_are_others(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmprune.training.step.SharedStatistics", contextlib.nullcontext)
    assert on_processes(lambda rank: train(tmp_path, rank), tmp_path) == [0, 0]
    with pytest.raises(AssertionError):
        compare(tmp_path, alone, 1)


@pytest.mark.parametrize(("first", "then"), [(1, 3), (2, 1)])
def test_another_number_of_processes_goes_on(first: int, then: int, alone: Path, tmp_path: Path) -> None:
    stopped = on_processes(lambda rank: train(tmp_path, rank, stop=7), tmp_path, first)
    assert stopped == [1] * first and "KeyboardInterrupt" in (tmp_path / "0.txt").read_text()
    assert torch.load(tmp_path / "c.pt")["step"] in (6, 7)  # the last one that all processes agreed on
    assert on_processes(lambda rank: train(tmp_path, rank), tmp_path, then) == [0] * then
    compare(tmp_path, alone, then)


def test_an_error_right_after_something_was_shared_ends_all(tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        with process_group(torch.device("cpu")):
            share_state(tiny_net(), 2)
            raise TypeError

    assert on_processes(fail, tmp_path) == [1, 1]  # with torch 2.6 they hung


def test_devices_and_batches_that_cannot_be_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    check_batch(1)
    check_device(torch.device("cuda:1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a batch of 1 images cannot be divided among 2 processes"):
        check_batch(1)
    with pytest.raises(ConfigError, match="each takes its own"):
        check_device(torch.device("cuda:1"))
    with pytest.raises(ConfigError, match=r"2 processes on \d GPUs"):
        check_device(torch.device("cuda"))
