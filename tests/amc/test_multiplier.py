"""The width multiplier is found as all other widths are: with something in hand, and not by one lucky measurement."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rmprune.amc.choose import Goal
from rmprune.amc.multiplier import width_multiplier
from rmprune.config import AmcConfig, SearchConfig
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.measure.widest import Widest

IMAGES = torch.zeros(2, 1, 4, 4)
CONFIG = AmcConfig(search=SearchConfig(constraint="latency"))


def make(width: float) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, max(1, round(80 * width)), 1), nn.Flatten())


def width_of(network: nn.Module) -> float:
    return network[0].out_channels / 80  # type: ignore[index]


def found(law: Callable[[float], float], ratio: float, measured: list[float] | None = None) -> Widest:
    """By times that a law makes up for a width."""

    def ratios(networks: dict[str, nn.Module]) -> dict[str, float]:
        widths = {name: width_of(network) for name, network in networks.items()}
        if measured is not None:
            measured.extend(widths.values())
        return {name: law(width) for name, width in widths.items()}

    timing: Any = SimpleNamespace(place=SimpleNamespace(ratios=ratios))
    return width_multiplier(make, make(1.0), IMAGES, CONFIG, Goal(ratio, timing))


def test_a_width_that_just_fits_has_nothing_in_hand() -> None:
    assert found(lambda width: width, 0.5) == Widest(pytest.approx(0.475), pytest.approx(0.475))


def test_of_many_widths_none_is_taken_for_one_lucky_measurement() -> None:
    """What the widest of forty single measurements would be: one that was too slow in truth."""
    seen: set[float] = set()

    def law(width: float) -> float:
        lucky = width not in seen and 0.5 < width < 0.9
        seen.add(width)
        return 0.4 if lucky else width

    result = found(law, 0.5)
    assert result.width <= 0.5 and result.ratio == pytest.approx(result.width)


def test_few_networks_are_measured_and_the_winner_twice() -> None:
    measured: list[float] = []
    result = found(lambda width: width**2, 0.5, measured)
    assert 0.65 <= result.width <= 0.7 and measured.count(width_of(make(result.width))) == 2 and len(measured) < 25


def test_too_small_a_budget_is_refused_with_the_least_that_can_be_had() -> None:
    with pytest.raises(
        InfeasibleBudget, match=r"the narrowest network costs 0\.525 times the original, more than 0\.5"
    ):
        found(lambda width: 0.5 + width, 0.5)


def test_costs_that_need_no_measurement_are_met_to_the_last() -> None:
    for constraint in ("macs", "params"):
        config = AmcConfig(search=SearchConfig(constraint=constraint))  # type: ignore[arg-type]
        result = width_multiplier(make, make(1.0), IMAGES, config, Goal(0.5))
        assert result == Widest(0.5, 0.5)


def test_networks_without_a_multiplier_are_refused() -> None:
    for model in ("resnet20", "mobilenet_v3_small"):  # the second is torchvision's, which has no such setting
        with pytest.raises(ConfigError, match=f"{model} has no width multiplier; leave the method 'uniform' out"):
            width_multiplier(make, make(1.0), IMAGES, AmcConfig(model=model), Goal(0.5))
