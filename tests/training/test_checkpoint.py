"""Checkpoints: a run goes on exactly, with what its hook has done; others and damaged ones are refused."""

import copy
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import few
from torch import Tensor, nn
from training_nets import CONFIG, Stop, blobs, records, same, tiny_net

from rmprune.config import DataConfig, SparsityConfig
from rmprune.data.given import GivenSplit
from rmprune.data.load import Dataset
from rmprune.errors import ArtifactError, RmpruneError
from rmprune.models.families import create
from rmprune.pruning import Budget
from rmprune.pruning.gradual import GradualPruner
from rmprune.training import TrainState, fit, make_optimizer
from rmprune.training.checkpoint import check_fingerprint, load_checkpoint, save_checkpoint
from rmprune.training.sparsity import ProximalL1


@pytest.mark.parametrize("after", few([1, 5, 7, 15], 5, 7))  # first step; the last of epoch 1; mid-epoch; the very last
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, after: int):
    hook = ProximalL1(SparsityConfig(strength=0.5))
    whole = fit(tiny_net(), blobs(), CONFIG, seed=3, hook=hook, log=tmp_path / "whole.jsonl")
    path, log = tmp_path / "checkpoint" / "dense.pt", tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=3, hook=Stop(after, hook), checkpoint=path, log=log)
    assert load_checkpoint(path)["step"] == after
    resumed = fit(tiny_net(), blobs(), CONFIG, seed=3, hook=hook, checkpoint=path, log=log)
    assert same(whole, resumed)
    facts = ("epoch", "train_loss", "train_accuracy", "validation_accuracy", "validation_loss", "learning_rate")
    for a, b in zip(records(tmp_path / "whole.jsonl"), records(log), strict=True):
        assert {key: a[key] for key in facts} == {key: b[key] for key in facts}
    assert [path.name for path in path.parent.iterdir()] == ["dense.pt"]


def test_a_crash_resumes_from_the_last_timed_checkpoint(tmp_path: Path):
    config = dataclasses.replace(CONFIG, checkpoint_seconds=1e-9)
    path = tmp_path / "c.pt"
    with pytest.raises(ZeroDivisionError):
        fit(tiny_net(), blobs(), config, seed=3, hook=Stop(8, error=ZeroDivisionError), checkpoint=path)
    assert load_checkpoint(path)["step"] == 7
    resumed = fit(tiny_net(), blobs(), CONFIG, seed=3, checkpoint=path)  # another checkpoint_seconds is no other run
    assert same(resumed, fit(tiny_net(), blobs(), CONFIG, seed=3))


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    path, log = tmp_path / "c.pt", tmp_path / "log.jsonl"
    first = fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=path, log=log)
    again = fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=path, log=log, hook=Stop(0))
    assert same(first, again) and len(records(log)) == 3


def test_ctrl_c_waits_for_the_step(tmp_path: Path):
    """A real signal in the middle of a step: the checkpoint is of a whole step, and goes on exactly."""

    class Signal(nn.Module):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if self.training and Signal.armed:
                Signal.armed = False
                os.kill(os.getpid(), signal.SIGINT)
            return x

    def net() -> nn.Module:
        return nn.Sequential(*tiny_net(), Signal())

    def arm(state: TrainState) -> None:
        Signal.armed = state.step == 6

    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(net(), blobs(), CONFIG, seed=0, checkpoint=path, hook=arm)
    assert load_checkpoint(path)["step"] == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = fit(net(), blobs(), CONFIG, seed=0, checkpoint=path)
    assert same(resumed, fit(net(), blobs(), CONFIG, seed=0))


def test_a_loader_that_is_told_to_end_as_well_is_no_error(tmp_path: Path):
    """Ctrl-C and Slurm tell all processes of a group."""

    def dies(state: TrainState) -> None:
        if state.step == 6:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=path, hook=dies)
    assert load_checkpoint(path)["step"] == 5  # of the end of the epoch: that step was not whole
    resumed = fit(tiny_net(), blobs(), CONFIG, seed=0, checkpoint=path)
    assert same(resumed, fit(tiny_net(), blobs(), CONFIG, seed=0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"label": "finetune"}, "stage is train there, finetune here"),
        ({"config": dataclasses.replace(CONFIG, epochs=4)}, "epochs is 3 there, 4 here"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}, "network differs"),
        ({"data": blobs(DataConfig(batch_size=8))}, "batch_size is 16 there, 8 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict, word: str):
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=Stop(2), checkpoint=path)
    before = path.read_bytes()
    call = {"model": tiny_net(), "data": blobs(), "config": CONFIG, "seed": 0} | change
    with pytest.raises(ArtifactError, match=word):
        fit(**call, checkpoint=path)
    assert path.read_bytes() == before


def test_another_network_on_images_of_a_loader_may_come_from_these(tmp_path: Path):
    whole = {"network": "a", "dataset": "given-1"}
    with pytest.raises(
        ArtifactError,
        match=r"network is a there, b here\); run with .* images that are the same each time .*, or delete",
    ):
        check_fingerprint(tmp_path, whole, whole | {"network": "b"})
    with pytest.raises(ArtifactError, match=r"seed is None there, 1 here\); run with those settings, or delete"):
        check_fingerprint(tmp_path, whole, whole | {"seed": 1})


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "code"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"format": 1, "net": tiny_net()}, path)  # pickled code: must not run
    with pytest.raises(ArtifactError, match=r"c\.pt is damaged"):
        load_checkpoint(path)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match="no space left"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1 and len(list(tmp_path.iterdir())) == 1


def cut(state: TrainState) -> None:
    """After step 7 keep the first three channels of the first convolution."""
    if state.step == 7:
        old = state.model
        new = copy.deepcopy(old)
        new[0] = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        new[1] = nn.BatchNorm2d(3)
        new[4] = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        with torch.no_grad():
            new[0].weight.copy_(old[0].weight[:3])
            new[4].weight.copy_(old[4].weight[:, :3])
            new[4].bias.copy_(old[4].bias)
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(new[1], name).copy_(getattr(old[1], name)[:3])
        state.model = new
        state.optimizer = make_optimizer(new, state.config)


def test_a_hook_may_replace_the_model(tmp_path: Path):
    seen = []

    def hook(state: TrainState) -> None:
        assert state.model[0].weight.grad is not None
        cut(state)
        seen.append((state.step, state.epoch, state.model[0].out_channels))

    whole = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=hook)
    assert whole[0].out_channels == 3
    assert seen[0] == (1, 0, 6) and seen[4] == (5, 0, 6) and seen[6] == (7, 1, 3) and seen[-1] == (15, 2, 3)
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=Stop(9, cut), checkpoint=path)
    assert load_checkpoint(path)["architecture"] is not None
    resumed = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=cut, checkpoint=path)
    assert same(whole, resumed)
    x = blobs().test.example(5)
    assert torch.equal(whole(x), resumed(x))


@pytest.mark.long
def test_pruning_while_training_goes_on_exactly(tmp_path: Path):
    torch.manual_seed(0)
    model = create("resnet8", num_classes=2, in_channels=1, width=4)

    class Pruner(GradualPruner):
        stop = -1

        def __call__(self, state: TrainState) -> None:
            super().__call__(state)
            if state.step == self.stop:
                signal.raise_signal(signal.SIGINT)

    def pruner(stop: int) -> Pruner:
        hook = Pruner(model, blobs().train.example(2), Budget(ratio=0.4), prune_epochs=2, every=2)
        hook.stop = stop
        return hook

    whole = fit(model, blobs(), CONFIG, seed=0, hook=pruner(-1))
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(model, blobs(), CONFIG, seed=0, hook=pruner(7), checkpoint=path)
    assert load_checkpoint(path)["architecture"] is not None
    assert same(whole, fit(model, blobs(), CONFIG, seed=0, hook=pruner(-1), checkpoint=path))
    assert sum(p.numel() for p in whole.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


def test_a_second_ctrl_c_within_a_hook_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The step is not whole before its hook has done its part."""
    pull, path = ProximalL1(SparsityConfig(strength=0.5)), tmp_path / "c.pt"
    config = dataclasses.replace(CONFIG, checkpoint_seconds=1e-9)
    whole = fit(tiny_net(), blobs(), config, seed=0, hook=pull)

    def hook(state: TrainState) -> None:
        if state.step == 8:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        pull(state)

    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), config, seed=0, hook=hook, checkpoint=path)
    assert load_checkpoint(path)["step"] == 7
    assert same(whole, fit(tiny_net(), blobs(), config, seed=0, hook=pull, checkpoint=path))


@pytest.mark.parametrize("measured", [False, True])
def test_a_second_ctrl_c_at_an_epochs_end_leaves_the_last_checkpoint(tmp_path: Path, measured: bool) -> None:
    """While statistics are measured, with dropout, or while they wait for the validation."""

    class Signal(nn.Module):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if Signal.armed and not torch.is_grad_enabled() and self.training != measured:
                Signal.armed = False
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return x

    def net() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.3), Signal(), *tiny_net())

    def arm(state: TrainState) -> None:
        Signal.armed = state.step == 10

    whole, path = fit(net(), blobs(), CONFIG, seed=0), tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(net(), blobs(), CONFIG, seed=0, hook=arm, checkpoint=path)
    assert load_checkpoint(path)["step"] == 5
    assert same(whole, fit(net(), blobs(), CONFIG, seed=0, checkpoint=path))


def test_the_state_of_a_hook_goes_into_the_checkpoint(tmp_path: Path):
    class Counter:
        steps = 0

        def __call__(self, state: TrainState) -> None:
            self.steps += 1
            assert self.steps == state.step
            if state.step == self.stop:
                signal.raise_signal(signal.SIGINT)

        def __init__(self, stop: int) -> None:
            self.stop = stop

        def state_dict(self) -> dict:
            return {"steps": self.steps}

        def load_state_dict(self, state: dict) -> None:
            self.steps = state["steps"]

    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=Counter(4), checkpoint=path)
    hook = Counter(-1)
    fit(tiny_net(), blobs(), CONFIG, seed=0, hook=hook, checkpoint=path)
    assert hook.steps == 15


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path):
    path = tmp_path / "c.pt"

    def poison(state: TrainState) -> None:
        if state.step == 10:
            state.model[0].weight.data.fill_(float("nan"))

    with pytest.raises(RmpruneError, match="no longer finite"):
        fit(tiny_net(), blobs(), CONFIG, seed=0, hook=poison, checkpoint=path)
    assert load_checkpoint(path)["step"] == 5


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_a_loss_of_one_s_own_goes_on_from_inside_an_epoch(tmp_path: Path, shift: float) -> None:
    """It counts no hits, and may be negative."""
    net, batches = (
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(),
        [(torch.randn(6, 1, 2, 2), torch.arange(6) % 3)] * 3,
    )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + shift

    split = GivenSplit(batches, net, loss, "train")
    data = Dataset("given", 0, (1, 2, 2), split, split, split, DataConfig(dataset="given"))
    config = dataclasses.replace(CONFIG, epochs=2)
    whole = fit(net, data, config, seed=3)
    with pytest.raises(KeyboardInterrupt):
        fit(net, data, config, seed=3, hook=Stop(4), checkpoint=tmp_path / "c.pt")
    totals = load_checkpoint(tmp_path / "c.pt")["totals"]
    assert totals[1].isnan() and (totals[0] < 0) == (shift < 0) and totals[2] > 0
    assert same(whole, fit(net, data, config, seed=3, checkpoint=tmp_path / "c.pt"))


class Interrupted:
    """A split whose first batch for training is slow to come: Ctrl-C, twice."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, *args: Any, **settings: Any) -> Any:
        if settings.get("augment"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        yield from self.split.batches(*args, **settings)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_what_was_stopped_before_its_first_step_goes_on(warmup: float, tmp_path: Path) -> None:
    config, path, data = dataclasses.replace(CONFIG, warmup_epochs=warmup), tmp_path / "c.pt", blobs()
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), dataclasses.replace(data, train=Interrupted(data.train)), config, seed=3, checkpoint=path)
    assert load_checkpoint(path)["step"] == 0
    assert same(fit(tiny_net(), data, config, seed=3, checkpoint=path), fit(tiny_net(), data, config, seed=3))
