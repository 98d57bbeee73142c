"""Re-centring: the function stays, and training mode computes it."""

import copy

import pytest
import torch
from removal_nets import small_resnet
from torch import nn

from rmprune import Budget, prune, remove_residuals
from rmprune.training.recentre import recentre


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def fitted(images: torch.Tensor) -> nn.Module:
    """A ResNet without residuals, cut once, its layers fitted."""
    data = [(images.float(), torch.arange(len(images)) % 4)]
    plain = remove_residuals(small_resnet(), images[:8].float()).model
    return prune(plain, images[:2].float(), budget=Budget(ratio=0.4), data=data, reconstruct=True).double()


@torch.no_grad()
def test_the_function_stays_and_training_mode_computes_it(fitted: nn.Module, images: torch.Tensor) -> None:
    before, weights = fitted(images), copy.deepcopy(fitted.state_dict())
    spread = (before - before.mean(0)).abs().max()
    moved = recentre(fitted, images.split(40))  # batches of unequal size
    assert float((moved(images) - before).abs().max() / spread) < 1e-12
    assert (
        float((moved.train()(images) - before).abs().max() / spread) < 1e-9
    )  # one batch of all images has their statistics
    assert float((copy.deepcopy(fitted).train()(images) - before).abs().max() / spread) > 0.05
    assert all(torch.equal(value, weights[name]) for name, value in fitted.state_dict().items())


def test_what_cannot_be_moved_stays() -> None:
    """No scale and shift, no statistics, or never reached: left alone; a channel that never varies stays finite."""
    unused = nn.BatchNorm2d(3)
    net = nn.Sequential(
        nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)
    ).eval()
    net.add_module("unused", nn.Identity())
    net.unused.norm = unused
    x = torch.rand(4, 3, 5, 5)
    x[:, 1] = 0.5
    moved = recentre(net, [x])
    assert torch.allclose(moved(x), net(x), atol=1e-6)
    assert all(bool(value.isfinite().all()) for value in moved.state_dict().values())
    for name in ("0.running_mean", "unused.norm.running_var", "unused.norm.weight"):
        assert torch.equal(moved.state_dict()[name], net.state_dict()[name])
