"""Our networks through RM: each becomes a plain chain of stock modules, equal within 1e-10 in float64."""

from typing import Any

import pytest
import torch
from torch import nn

from rmprune.models import create
from rmprune.models.repvgg import RepVGG, deploy
from rmprune.removal import remove_residuals

RMNEXT = {"blocks": (2, 1, 1, 1), "width": 8}
NETWORKS: list[tuple[str, dict[str, Any], int]] = [
    ("preact_resnet8", {"width": 4}, 12),
    ("preact_resnet18", {"width": 4}, 32),
    ("rmnext17x3_2", RMNEXT | {"small_images": True}, 12),
    ("rmnext17x3_4", RMNEXT, 32),
    ("mobilenet_v2_digits", {"width": 0.25, "free": 1}, 8),
    ("mobilenet_v2_digits", {"width": 0.25, "free": 3}, 8),
    ("repvgg13", {"width": 4, "small_images": True}, 10),
]


def random_statistics(model: nn.Module) -> nn.Module:
    """Float64 and eval mode, gains that saturate, statistics that are not fresh."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 4)
            nn.init.normal_(module.bias, 1)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 3)
    return model.double().eval()


@pytest.mark.parametrize(("name", "settings", "size"), NETWORKS, ids=[f"{n} {s}" for n, s, _ in NETWORKS])
def test_becomes_a_plain_chain(name: str, settings: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = random_statistics(create(name, num_classes=5, in_channels=2, **settings))
    removal = remove_residuals(model, torch.randn(4, 2, size, size, dtype=torch.float64))
    assert not removal.kept
    assert isinstance(removal.model, nn.Sequential)
    stock = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert {type(layer) for layer in removal.model} <= stock
    for x in (torch.randn(2, 2, size, size), 20 * torch.randn(2, 2, size, size) - 10):
        expected = model(x.double())
        assert (removal.model(x.double()) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("ratio", [0, 0.25, (0, 0.25, 0.5, 0.75)])
def test_removal_deploys_repvgg_as_deploy_does(ratio: float | tuple[float, ...]) -> None:
    torch.manual_seed(0)
    model = random_statistics(create("repvgg13", num_classes=5, width=4, small_images=True, reserve_ratio=ratio))
    assert isinstance(model, RepVGG)
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    removal = remove_residuals(model, x, batch_norm=False)
    assert not removal.kept
    plain = [layer for layer in removal.model if isinstance(layer, nn.Conv2d)]
    expected = [layer for layer in deploy(model) if isinstance(layer, nn.Conv2d)]
    assert [layer.weight.shape for layer in plain] == [layer.weight.shape for layer in expected]
    for ours, theirs in zip(plain, expected, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-10, atol=1e-12)
