"""The plainest control: the original network at a smaller width multiplier, the largest within the budget. It trains nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rmprune.amc.choose import Goal, network_cost
from rmprune.amc.space import COSTS
from rmprune.config import AmcConfig
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.measure.place import largest_within
from rmprune.models.families import has_multiplier

STEPS = 40  # multipliers between 0 and the original's


@dataclass(frozen=True)
class Multiplier:
    """A width multiplier, and the cost of its network as a fraction of the original's."""

    width: float
    ratio: float


def require_multiplier(config: AmcConfig) -> None:
    """Raise ConfigError for a network without a width multiplier."""
    if not has_multiplier(config.model):
        raise ConfigError(f"{config.model} has no width multiplier; leave the method 'uniform' out")


def width_multiplier(
    make: Callable[[float], nn.Module], original: nn.Module, example: Tensor, config: AmcConfig, goal: Goal
) -> Multiplier:
    """The largest multiplier whose network costs at most `goal.ratio` times the original. `make(width)` builds one.

    In measured time it is searched for as all others are (`measure.place.largest_within`): something in hand, and measured twice.
    Raises InfeasibleBudget where even the narrowest is too dear, ConfigError where the network has no multiplier.
    """
    require_multiplier(config)
    networks: dict[float, nn.Module] = {}
    firsts: dict[tuple[int, ...], float] = {}
    whole = config.width or 1.0
    for width in (whole * step / STEPS for step in range(1, STEPS + 1)):
        model = make(width).eval()
        if firsts.setdefault(tuple(p.numel() for p in model.parameters()), width) == width:
            networks[width] = model  # of networks that rounding makes equal the first is kept

    def refuse(least: float) -> InfeasibleBudget:
        return InfeasibleBudget(
            f"uniform: the narrowest network costs {least:.3g} times the original, more than {goal.ratio:g}"
        )

    if goal.timing is not None:
        place = goal.timing.place

        def measure(widths: Sequence[float]) -> list[float]:
            return list(place.ratios({str(width): networks[width] for width in widths}).values())

        def at(size: float) -> float:
            return min(networks, key=lambda width: abs(width - size))

        found = largest_within(goal.ratio, at, float, measure, min(networks), max(networks), refuse=refuse)
        return Multiplier(found.candidate, found.ratio)
    cost = COSTS[config.search.constraint]
    base = network_cost(original, example, cost)
    ratios = {width: network_cost(model, example, cost) / base for width, model in networks.items()}
    fitting = [width for width, ratio in ratios.items() if ratio <= goal.ratio]
    if not fitting:
        raise refuse(min(ratios.values()))
    return Multiplier(max(fitting), ratios[max(fitting)])
