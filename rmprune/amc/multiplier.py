"""The plainest control: the original network at a smaller width multiplier, the largest within the budget. It trains nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from rmprune.amc.choose import Timing, network_cost
from rmprune.amc.space import COSTS
from rmprune.config import AmcConfig
from rmprune.errors import ConfigError, InfeasibleBudget

STEPS = 40  # multipliers tried between 0 and the original's


@dataclass(frozen=True)
class Multiplier:
    """A width multiplier, and the cost of its network as a fraction of the original's."""

    width: float
    ratio: float


def require_multiplier(config: AmcConfig) -> None:
    """Raise ConfigError for a network without a width multiplier."""
    if not config.model.startswith("mobilenet"):
        raise ConfigError(f"{config.model} has no width multiplier; leave the method 'uniform' out")


def width_multiplier(
    make: Callable[[float], nn.Module],
    original: nn.Module,
    example: Tensor,
    config: AmcConfig,
    ratio: float,
    timing: Timing | None,
) -> Multiplier:
    """The largest multiplier whose network costs at most `ratio` times the original. `make(width)` builds one.

    With `timing` all candidates are measured in turns. Raises InfeasibleBudget where even the narrowest is too dear,
    ConfigError where the network has no multiplier.
    """
    require_multiplier(config)
    whole = config.width or 1.0
    candidates: dict[tuple[int, ...], tuple[float, nn.Module]] = {}
    for step in range(1, STEPS + 1):  # of networks that rounding makes equal the first is kept
        width = whole * step / STEPS
        model = make(width).eval()
        candidates.setdefault(tuple(p.numel() for p in model.parameters()), (width, model))
    networks = {f"{width:g}": (width, model) for width, model in candidates.values()}
    if timing is not None:
        ratios = timing.place.ratios({name: model for name, (_, model) in networks.items()})
    else:
        cost = COSTS[config.search.constraint]
        base = network_cost(original, example, cost)
        ratios = {name: network_cost(model, example, cost) / base for name, (_, model) in networks.items()}
    fitting = [Multiplier(width, ratios[name]) for name, (width, _) in networks.items() if ratios[name] <= ratio]
    if not fitting:
        least = min(ratios.values())
        raise InfeasibleBudget(
            f"uniform: the narrowest network costs {least:.3g} times the original, more than {ratio:g}"
        )
    return max(fitting, key=lambda found: found.width)
