"""What each stock activation does to a channel: where it is the identity, how a pair recovers x, which interval it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

INFINITY = math.inf


@dataclass(frozen=True)
class Rule:
    """Facts about an elementwise activation.

    low, high: the interval on which act(x) = x exactly (RM.md 2); low > high means nowhere.
    odd: c where act(x) - act(-x) = c * x for every |x| <= reach, else None. Then two copies recover x without any bounds.
    slopes: the activation has one slope a channel (PReLU), so that a copy can be given slope 1.
    """

    low: float
    high: float
    odd: float | None = None
    reach: float = INFINITY
    slopes: bool = False


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a stock activation; None for anything else."""
    found = _RULES.get(type(module))
    return None if found is None else found(module)


def _hardtanh(module: Any) -> Rule:
    low, high = float(module.min_val), float(module.max_val)
    odd = None if high <= 0 else 1.0 if low == 0 else 2.0 if low == -high else None
    return Rule(low, high, odd, high)


_NOWHERE = Rule(1.0, 0.0)
_RULES: dict[type[nn.Module], Callable[[Any], Rule]] = {
    nn.ReLU: lambda _: Rule(0.0, INFINITY, 1.0),
    nn.ReLU6: lambda _: Rule(0.0, 6.0, 1.0, 6.0),
    nn.Hardtanh: _hardtanh,
    nn.LeakyReLU: lambda module: Rule(0.0, INFINITY, 1.0 + module.negative_slope),
    nn.PReLU: lambda _: Rule(0.0, INFINITY, None, slopes=True),
    nn.Hardswish: lambda _: Rule(3.0, INFINITY, 1.0),
    nn.SiLU: lambda _: Rule(1.0, 0.0, 1.0),
    nn.GELU: lambda _: Rule(1.0, 0.0, 1.0),
    # PyTorch replaces softplus by x beyond the threshold: exp(-threshold) off, below float64 rounding from 37 on.
    nn.Softplus: lambda module: Rule(1.0, 0.0, 1.0 if module.threshold >= 37 else None),
    nn.Sigmoid: lambda _: _NOWHERE,
    nn.Hardsigmoid: lambda _: _NOWHERE,
    nn.Tanh: lambda _: _NOWHERE,
    nn.ELU: lambda _: Rule(0.0, INFINITY),
    nn.Mish: lambda _: _NOWHERE,
}
# The least value of an activation, and where it is taken, for those that first fall and then rise.
_VALLEYS: dict[type[nn.Module], tuple[float, float]] = {
    nn.SiLU: (-1.278464542761074, -0.2784645427610739),
    nn.Hardswish: (-1.5, -0.375),
    nn.Mish: (-1.1924312145485868, -0.3088434130172504),
}
_GELU_VALLEY = {
    "none": (-0.7517915246935645, -0.16997120747990369),
    "tanh": (-0.7524614220710164, -0.17004075057125405),
}


def image(module: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """The interval that an activation makes of [low, high], channel by channel; None where the module is unknown."""
    if rule_of(module) is None:
        return None
    if isinstance(module, nn.PReLU):
        slope = module.weight.detach().to(low)
        ends = [torch.where(end >= 0, end, torch.where(slope == 0, 0.0, slope * end)) for end in (low, high)]
        first, second = ends
        inside = (low < 0) & (high > 0)
        bottom, top = torch.minimum(first, second), torch.maximum(first, second)
        return torch.where(inside, torch.clamp(bottom, max=0.0), bottom), torch.where(
            inside, torch.clamp(top, min=0.0), top
        )
    valley = _VALLEYS.get(type(module))
    if isinstance(module, nn.GELU):
        valley = _GELU_VALLEY[module.approximate]
    ends = [_ends(module, end) for end in (low, high)]
    if valley is None:  # never falls, except LeakyReLU with a negative slope
        if isinstance(module, nn.LeakyReLU) and module.negative_slope < 0:
            return torch.zeros_like(low), torch.maximum(*ends)
        return ends[0], ends[1]
    bottom = torch.minimum(*ends)
    inside = (low <= valley[0]) & (high >= valley[0])
    return torch.where(inside, torch.full_like(bottom, valley[1] - 1e-9), bottom), torch.maximum(*ends)


def _ends(module: nn.Module, end: Tensor) -> Tensor:
    """act(end) with its limits at +-infinity, where PyTorch gives NaN for x * sigmoid(x)."""
    value = module(end.clamp(-1e30, 1e30))
    if isinstance(module, nn.SiLU | nn.GELU | nn.Mish | nn.Hardswish):
        value = torch.where(end <= -1e30, torch.zeros_like(value), value)
    rising = isinstance(
        module, nn.SiLU | nn.GELU | nn.Mish | nn.Hardswish | nn.ReLU | nn.LeakyReLU | nn.ELU | nn.Softplus
    )
    value = torch.where((end == INFINITY) & rising, end, value)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope > 0:
        value = torch.where(end == -INFINITY, end, value)
    return value
