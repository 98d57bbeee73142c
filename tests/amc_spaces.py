"""Small networks as the search sees them."""

import torch
from torch import nn

from rmprune.amc.environment import Environment
from rmprune.amc.space import Limits, Space
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import SizedLayer, macs

X = torch.randn(2, 3, 8, 8)


def conv(cin: int, cout: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU6(),
    ]


def v1() -> nn.Sequential:
    """A small MobileNetV1: stem, then depthwise and pointwise; the first depthwise is tied to the stem."""
    return nn.Sequential(
        *conv(3, 16, 3), *conv(16, 16, 3, groups=16), *conv(16, 40), *conv(40, 40, 3, groups=40, stride=2), *conv(40, 36),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(36, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two inverted residuals on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, 16, 3))
        self.a = nn.Sequential(*conv(16, 32), *conv(32, 32, 3, groups=32), nn.Conv2d(32, 16, 1))
        self.b = nn.Sequential(*conv(16, 48), *conv(48, 48, 3, groups=48), nn.Conv2d(48, 16, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        return self.head(x + self.b(x))


def structure(model: nn.Module) -> Structure:
    return find_structure(model, X)


def jagged(layer: SizedLayer, cin: int, cout: int) -> float:
    """A measured-time-like cost: not monotone, widths off the multiples of 8 are dearer."""
    return macs(layer, cin, cout) * (1.0 if cin % 8 == 0 and cout % 8 == 0 else 1.6) + 50


STRUCTURES = {"v1": structure(v1()), "residual": structure(Residual())}


def space(name: str = "v1", ratio: float = 0.5, cost=macs, **limits) -> Space:  # type: ignore[no-untyped-def]
    found = STRUCTURES[name]
    whole = sum(cost(layer, layer.cin, layer.cout) for layer in found.layers)
    return Space(found, cost, ratio * whole, Limits(**limits))


def environment(*args, **kwargs) -> Environment:  # type: ignore[no-untyped-def]
    return Environment(space(*args, **kwargs), lambda widths: 0.5)


def play(env: Environment, actions: list[float]) -> list[float]:
    env.reset()
    executed = []
    for action in actions:
        outcome = env.step(action)
        executed.append(outcome.action)
    assert outcome.done
    return executed
