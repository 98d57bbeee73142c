"""`scratch`: the architecture at a smaller width, to be trained from nothing. What pruning has to beat. Trains nothing itself."""

import functools
from collections.abc import Callable

from torch import nn

from rmprune.config import SlimConfig
from rmprune.errors import ConfigError
from rmprune.measure.widest import STEPS, Widest, smaller_widths, widest
from rmprune.methods.costs import cost_ratios
from rmprune.methods.refuse import refuse_too_dear
from rmprune.models.families import default_width, has_multiplier
from rmprune.pruning import Budget
from rmprune.training.job import Job

NARROWEST = "scratch: the narrowest network"
Make = Callable[[float], nn.Module]
"""make(width): the network at this width, with random weights."""


def own_width(job: Job[SlimConfig]) -> float:
    """The width of the original. Raises ConfigError where the network has none, is no network by name, or starts from weights."""
    config = job.config
    width = None if job.given is not None else config.width or default_width(config.model)
    if width is None:
        what = "a network of one's own" if job.given is not None else f"{config.model} (without --width)"
        raise ConfigError(f"scratch trains the network at a smaller width, and {what} has none; leave the method out")
    if config.weights is not None:
        raise ConfigError(
            "scratch trains narrower networks, which the weights do not fit; leave the method or --weights out"
        )
    return width


def narrowed(make: Make, budget: Budget, job: Job[SlimConfig]) -> Widest:
    """The largest width within the budget. Raises InfeasibleBudget where even the narrowest network is too dear."""
    widths = smaller_widths(make, own_width(job), whole=not has_multiplier(job.config.model))
    ratios, timed = functools.partial(cost_ratios, budget, job), budget.latency_ratio is not None
    return widest(NARROWEST, make, widths, ratios, budget.value, timed=timed)


def check_narrowest(make: Make, budget: Budget, job: Job[SlimConfig]) -> None:
    """Raise InfeasibleBudget where the network of the least width is too dear."""
    least = own_width(job) / STEPS if has_multiplier(job.config.model) else 1.0
    refuse_too_dear(NARROWEST, make(least), budget, job)
