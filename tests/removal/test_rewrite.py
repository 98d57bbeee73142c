"""Blocks whose two ways are one linear map are merged, nothing reserved."""

import pytest
import torch
from removal_nets import (
    Residual,
    ThreeWays,
    basic,
    branch,
    conv_bn,
    images,
    prepared,
    removed,
    stem,
    worst_error,
)
from torch import Tensor, nn

from rmprune.removal import remove_residuals


def test_linear_branches_merge_with_nothing_reserved() -> None:
    """RepVGG: 3x3 with batch norm, 1x1 with batch norm, and the identity with a batch norm are one 3x3."""
    removal = removed(prepared(*stem(), ThreeWays(), ThreeWays()))
    assert [(b.form, b.reserved) for b in removal.blocks] == [("linear", 0)] * 4
    assert removal.removed == ["3#1", "3#2", "4#1", "4#2"]
    assert [m.kernel_size for m in removal.model if isinstance(m, nn.Conv2d)] == [(3, 3)] * 3


def test_scaled_branches() -> None:
    """Inception-ResNet's 0.2 * f(x) + x."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = branch(conv_bn(6, 6), conv_bn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(0.2 * self.body(x) + x)

    removed(prepared(*stem(), Scaled(), Scaled()))


@pytest.mark.parametrize("passed", [2, 4])
def test_a_reserve_ratio_ends_as_one_kernel(passed: int) -> None:
    """RM.md 7: cat(x[:rC], bn3(conv3(x)) + bn1(conv1(x)) + bn0(x[rC:])) is one 3x3 whose first rows are Dirac."""

    class Reserving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point, self.norm = (
                conv_bn(6, 6 - passed),
                conv_bn(6, 6 - passed, 1),
                nn.BatchNorm2d(6 - passed),
            )

        def forward(self, x: Tensor) -> Tensor:
            rest = self.wide(x) + self.point(x) + self.norm(x[:, passed:])
            return torch.relu(torch.cat([x[:, :passed], rest], 1))

    removal = removed(prepared(*stem(), Reserving(), Reserving()))
    assert type(removal.model) is nn.Sequential
    assert [(m.in_channels, m.out_channels) for m in removal.model if isinstance(m, nn.Conv2d)] == [
        (3, 6),
        (6, 6),
        (6, 6),
    ]


def test_separable_convolutions_keep_their_pairs() -> None:
    """Xception: activation, depthwise, pointwise, three times; nothing bounds x, and a depthwise layer cannot mix a pair."""
    layers: list[nn.Module] = []
    for inputs in (6, 8, 8):
        layers += [nn.ReLU(), *conv_bn(inputs, inputs, groups=inputs), *conv_bn(inputs, 8, 1)]
    removal = removed(prepared(*conv_bn(3, 6), Residual(nn.Sequential(*layers), conv_bn(6, 8, 1))))
    assert removal.blocks[0].form == "pair"


def test_layers_with_dynamic_padding_are_no_plain_convolutions() -> None:
    """timm's Conv2dSame is an nn.Conv2d of padding 0 that pads by itself."""
    timm_layers = pytest.importorskip("timm.layers")
    inner = nn.Sequential(timm_layers.Conv2dSame(6, 6, 3), nn.ReLU(), *conv_bn(6, 6))
    model = prepared(*stem(), Residual(inner, None, nn.ReLU()), basic())
    removal = remove_residuals(model, images())
    assert removal.removed == ["4"] and list(removal.kept) == ["3"] and worst_error(removal, model) < 1e-12
