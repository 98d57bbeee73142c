"""Pre-activation ResNets: depths, stems and the block's equation."""

import pytest
import torch
from torch import nn

from rmprune.errors import ConfigError
from rmprune.models.preact import PreActBlock, preact_resnet


@pytest.mark.parametrize("depth", [8, 18, 20, 34])
def test_depth_counts_the_layers_on_the_main_path(depth: int) -> None:
    with torch.device("meta"):
        model = preact_resnet(f"preact_resnet{depth}")
    assert 1 + 2 * sum(isinstance(m, PreActBlock) for m in model.modules()) + 1 == depth


def test_stems() -> None:
    small = preact_resnet("preact_resnet18", num_classes=4, width=4, small_images=True, in_channels=1).eval()
    assert small.layers(small.maxpool(small.conv1(torch.zeros(1, 1, 16, 16)))).shape == (1, 32, 2, 2)
    large = preact_resnet("preact_resnet18", num_classes=4, width=4).eval()
    assert large.layers(large.maxpool(large.conv1(torch.zeros(1, 3, 64, 64)))).shape == (1, 32, 2, 2)
    assert preact_resnet("preact_resnet8", num_classes=4).eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 1), (4, 2)])
def test_block_is_its_equation(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = PreActBlock(4, channels, stride).double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    kept = x.clone()
    activated = block.bn1(x).relu()
    branch = block.conv2(block.bn2(block.conv1(activated)).relu())
    shortcut = x if (channels, stride) == (4, 1) else block.shortcut(activated)
    torch.testing.assert_close(block(x), branch + shortcut, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, kept)  # no in-place activation reaches the shortcut


def test_is_deterministic_given_the_seed_and_traceable() -> None:
    torch.manual_seed(3)
    first = preact_resnet("preact_resnet14", width=4)
    torch.manual_seed(3)
    second = preact_resnet("preact_resnet14", width=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.fx.symbolic_trace(first)


@pytest.mark.parametrize("depth", [2, 19, 51])
def test_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ConfigError):
        preact_resnet(f"preact_resnet{depth}")
