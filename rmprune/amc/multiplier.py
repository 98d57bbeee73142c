"""The plainest control: the original network at a smaller width, the largest within the budget. It trains nothing."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rmprune.amc.choose import Goal, whole_cost
from rmprune.config import AmcConfig
from rmprune.errors import ConfigError
from rmprune.measure.widest import Widest, smaller_widths, widest
from rmprune.models.families import has_multiplier


def require_multiplier(config: AmcConfig) -> None:
    """Raise ConfigError for a network without a width multiplier."""
    if not has_multiplier(config.model):
        raise ConfigError(f"{config.model} has no width multiplier; leave the method 'uniform' out")


def width_multiplier(
    make: Callable[[float], nn.Module], original: nn.Module, example: Tensor, config: AmcConfig, goal: Goal
) -> Widest:
    """The largest multiplier whose network costs at most `goal.ratio` times the original. `make(width)` builds one.

    Raises InfeasibleBudget where even the narrowest is too dear, ConfigError where the network has no multiplier.
    """
    require_multiplier(config)
    widths = smaller_widths(make, config.width or 1.0, whole=False)
    if goal.timing is not None:
        return widest("uniform: the narrowest network", make, widths, goal.timing.place.ratios, goal.ratio, timed=True)
    constraint = config.search.constraint
    base = whole_cost(original, example, constraint)

    def ratios(networks: Mapping[str, nn.Module]) -> dict[str, float]:
        return {name: whole_cost(network, example, constraint) / base for name, network in networks.items()}

    return widest("uniform: the narrowest network", make, widths, ratios, goal.ratio, timed=False)
