"""MobileNetV2: torchvision's network name by name, and the free width's meaning."""

import pytest
import torch
import torchvision
from torch import nn

from rmprune.errors import ConfigError
from rmprune.models.mobilenet import InvertedResidual, mobilenet_v2


def randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double().eval()


def test_is_torchvisions_mobilenet_v2_name_by_name() -> None:
    theirs = randomise(torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.35))
    ours = mobilenet_v2(num_classes=7, width=0.35).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("free", [1, 3])
def test_small_images_keep_a_map(free: int) -> None:
    model = mobilenet_v2("mobilenet_v2_small", num_classes=10, in_channels=1, width=0.25, free=free).eval()
    assert model.features(torch.zeros(1, 1, 28, 28)).shape[-2:] == (4, 4)
    digits = mobilenet_v2("mobilenet_v2_digits", num_classes=10, in_channels=1, width=0.5, free=free).eval()
    assert digits.features(torch.zeros(1, 1, 8, 8)).shape[-2:] == (2, 2)
    assert digits(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("in_free", [1, 2])
def test_free_width_adds_the_first_channels_only(in_free: int) -> None:
    block = randomise(InvertedResidual(4, 4, stride=1, expansion=3, in_free=in_free, free=2))
    x = torch.randn(2, 4 * in_free, 5, 5, dtype=torch.float64)
    expected = block.conv(x)
    expected[:, :4] += x[:, :4]
    assert torch.equal(block(x), expected)
    assert expected.shape[1] == 8
    assert block.conv[0][0].in_channels == 4 * in_free  # the expansion reads every channel


def test_selection_is_frozen_and_survives_a_training_step() -> None:
    model = mobilenet_v2("mobilenet_v2_digits", num_classes=10, in_channels=1, width=0.5, free=2)
    selections = [m.select for m in model.modules() if isinstance(m, InvertedResidual) and m.select is not None]
    before = [s.weight.clone() for s in selections]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert selections
    assert all(torch.equal(s.weight, w) for s, w in zip(selections, before, strict=True))


def test_is_deterministic_given_the_seed_and_traceable() -> None:
    torch.manual_seed(3)
    first = mobilenet_v2("mobilenet_v2_digits", num_classes=10, free=2)
    torch.manual_seed(3)
    second = mobilenet_v2("mobilenet_v2_digits", num_classes=10, free=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.fx.symbolic_trace(first)


@pytest.mark.parametrize("bad", [{"width": 0.0}, {"free": 0}, {"strides": (1, 1)}])
def test_refuses_impossible_settings(bad: dict) -> None:
    with pytest.raises(ConfigError):
        mobilenet_v2(**bad)
