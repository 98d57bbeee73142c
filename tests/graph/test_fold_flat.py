"""Batch norms folded into the modules before them: flat networks stay flat, and what must not be folded is not."""

import pytest
import torch
from removal_nets import conv, conv_bn, images, prepared
from torch import nn

from rmprune.graph.fold import fold_batch_norms


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


def test_a_flat_network_stays_flat_and_keeps_its_names() -> None:
    model = prepared(*conv_bn(3, 6), nn.ReLU(), nn.Dropout(), nn.Identity(), *conv_bn(6, 4), nn.BatchNorm2d(4))
    folded = fold_batch_norms(model)
    assert type(folded) is nn.Sequential and list(folded._modules) == ["0", "2", "5"]
    assert kinds(folded) == ["Conv2d", "ReLU", "Conv2d"]
    torch.testing.assert_close(folded(images()), model(images()))


@pytest.mark.parametrize("norm_too", [False, True])
def test_a_layer_that_runs_twice_keeps_its_norms(norm_too: bool) -> None:
    shared, norm = conv(3, 3), nn.BatchNorm2d(3)
    model = prepared(shared, norm, shared, norm if norm_too else nn.BatchNorm2d(3), nn.ReLU())
    folded = fold_batch_norms(model)
    assert kinds(folded) == kinds(model)[: len(kinds(folded))] and len(folded._modules) == 5
    assert folded[0] is folded[2]
    torch.testing.assert_close(folded(images()), model(images()))


def test_a_norm_without_statistics_stays() -> None:
    model = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6, track_running_stats=False)).double().eval()
    assert kinds(fold_batch_norms(model)) == ["Conv2d", "BatchNorm2d"]


def test_nothing_at_all() -> None:
    x = images()
    assert torch.equal(fold_batch_norms(nn.Sequential())(x), x)
