"""Batch norms at an epoch's end: measured on the weights as they are, so that evaluation does not fall behind training."""

import copy
import dataclasses

import pytest
import torch
from slim_runs import inverted
from torch import nn

from rmprune import Budget, plan_removal, prune
from rmprune.config import DataConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.models import create
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.training import evaluate, fit
from rmprune.training.recentre import recentre
from rmprune.training.statistics import measure_statistics


def test_statistics_are_the_mean_of_those_of_the_batches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3)).eval()
    batches = [torch.randn(n, 3, 4, 4) * 3 + 1 for n in (8, 8, 4)]
    by_loss = copy.deepcopy(net)
    measure_statistics(net, ((x, None) for x in batches))
    measure_statistics(by_loss, ((x, {"x": x}) for x in batches), lambda model, y: model(y["x"]).mean())
    for tuned in (net, by_loss):
        first, last = tuned[0], tuned[2]
        assert isinstance(first, nn.BatchNorm2d) and isinstance(last, nn.BatchNorm2d)
        assert first.running_mean is not None and first.running_var is not None
        torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
        torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
        assert not tuned.training and not last.training and last.momentum == 0.3


class Frozen(nn.Sequential):
    """The usual way to freeze a batch norm."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self[0].eval()
        return self


def test_what_a_step_leaves_alone_is_left_alone() -> None:
    net = Frozen(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.0), nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    net[2].eval()  # by hand, for now
    before = copy.deepcopy(net.state_dict())
    measure_statistics(net, [(torch.randn(8, 3, 4, 4) + 1, None)])
    assert [module.training for module in net] == [False, True, False, True]
    means = {name: value for name, value in net.state_dict().items() if name.endswith("running_mean")}
    assert {name[0] for name, value in means.items() if not torch.equal(value, before[name])} == {"2", "3"}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig())


TRAIN = TrainConfig(epochs=8, precision="float32")


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> nn.Module:
    torch.manual_seed(0)
    model = create("resnet8", num_classes=10, in_channels=1, width=8)
    return fit(model, digits, TRAIN, seed=0, progress=False)


@pytest.mark.parametrize("form", ["remove", "merge", "fuse"])
def test_an_epoch_of_fine_tuning_never_jumps(form: str, digits: Dataset, trained: nn.Module) -> None:
    """A trained network, cut and fitted, is no worse after an epoch at the default rate than noise makes it."""
    torch.manual_seed(0)
    model = fit(inverted(), digits, TRAIN, seed=0, progress=False) if form == "fuse" else trained
    x = digits.train.example(128)
    choices = {report.name: form for report in plan_removal(model, x[:2])}
    plain, _ = carry_out_blocks(model, choices, lambda count: x[:count])
    data = list(digits.train.batches(128))
    fitted = recentre(prune(plain, x[:2], budget=Budget(ratio=0.4), data=data, reconstruct=True), [x])
    rate = SlimConfig(prune=PruneConfig(ratio=(0.7,))).finetune.learning_rate
    once = dataclasses.replace(TRAIN, epochs=1, learning_rate=rate, schedule="constant", warmup_epochs=0.0)
    tuned = fit(fitted, digits, once, seed=0, progress=False)
    before, after = (evaluate(network, digits.test).accuracy for network in (fitted, tuned))
    assert after > before - 0.03  # two deviations of a difference in 359 images where the two agree on most
