"""Re-centring: the function stays, and training mode computes it."""

import copy

import pytest
import torch
from marks import few
from pruning_nets import randomise
from slim_runs import inverted
from torch import nn

from rmprune import Budget, plan_removal, prune
from rmprune.models import create
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.training.recentre import recentre


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module", params=few(["remove", "merge", "fuse"], "merge"))
def fitted(request: pytest.FixtureRequest, images: torch.Tensor) -> nn.Module:
    """A ResNet without residuals or of merged blocks, inverted residuals in MobileNetV1's form; cut once, the layers fitted."""
    torch.manual_seed(0)
    model = randomise(
        inverted() if request.param == "fuse" else create("resnet8", num_classes=4, in_channels=1, width=8)
    ).eval()
    x = images.float()
    choices = {report.name: request.param for report in plan_removal(model, x[:2])}
    plain, _ = carry_out_blocks(model, choices, lambda count: x[:count])
    data = [(x, torch.arange(len(x)) % 4)]
    return prune(plain, x[:2], budget=Budget(ratio=0.4), data=data, reconstruct=True).double()


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


def test_norms_that_share_scale_and_shift_stay() -> None:
    """What the one's scale and shift take up, the other's would multiply and add as well; so would code that reads them."""

    class Reads(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self[6].weight.view(1, -1, 1, 1)

    torch.manual_seed(0)
    net = randomise(
        Reads(*(layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())))
    ).eval()
    net[4].weight, net[4].bias = net[1].weight, net[1].bias
    net[6] = nn.BatchNorm2d(3).eval()
    x = torch.randn(16, 3, 4, 4) * 3 + 1
    moved = recentre(net, [x])
    with torch.no_grad():
        assert torch.allclose(moved(x), net(x), atol=1e-5)
    means = [torch.equal(moved[at].running_mean, net[at].running_mean) for at in (1, 4, 6, 10)]
    assert means == [True, True, True, False]
