"""Everything about a method and a budget that can be refused before anything is trained, and how it is said."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from rmprune.config import SlimConfig
from rmprune.errors import InfeasibleBudget, UnsupportedModel
from rmprune.measure.layers import network_layers
from rmprune.measure.place import infeasible
from rmprune.measure.widest import too_dear
from rmprune.methods.costs import cost_ratios, place_of
from rmprune.methods.cutter import make_cutter
from rmprune.methods.table import METHODS, Method
from rmprune.pruning import Budget
from rmprune.pruning.time_cost import timed_layers
from rmprune.removal.remove import NothingToRemove
from rmprune.training.job import Job

logger = logging.getLogger("rmprune")
Refusal = InfeasibleBudget | UnsupportedModel
NOISE = 1.1  # before training a budget is refused only where it is missed by more than this
Starts = Callable[[str], nn.Module]
"""The network that methods prune, by its name in STARTS."""


def check_budgets(
    start: Starts, methods: dict[str, Method], budgets: list[Budget], job: Job[SlimConfig],
    searches: Mapping[str, Callable[[Budget], object]] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Raise before any training: InfeasibleBudget where limits forbid a budget, UnsupportedModel where a method has nothing to work on.

    Networks may have any weights. Of a method's candidates one that can do it is enough; with `skip_infeasible` one method is enough
    for a budget, and one budget for the run. `searches`: {method: what raises where it finds nothing}; candidates of one are looked at
    for budgets in time alone.
    """
    least: dict[str, float] = {}
    none: list[Refusal] = []
    for budget in budgets:
        refusals: dict[str, Refusal] = {}
        for name, method in methods.items():
            logger.info("before training: can %s meet %s %g?", name, budget.name, budget.value)
            try:
                if name in searches:
                    searches[name](budget)
                if name not in searches or (method.candidates and budget.latency_ratio is not None):
                    _check_any(name, method, start, budget, job, least)
            except InfeasibleBudget as error:
                skip(name, error, job.config)
                refusals[name] = error
        if len(refusals) == len(methods):
            none.append(refusal("no method can be had", refusals))
            if len(none) == len(budgets):
                raise none[0]


def _check_any(
    name: str, method: Method, start: Starts, budget: Budget, job: Job[SlimConfig], least: dict[str, float]
) -> None:
    """The method itself, or one of its candidates. `least`: {method: time of its narrowest network, relative}, where it was measured."""
    if not method.candidates:
        _check(name, method, start, budget, job, least)
        return
    refusals: dict[str, Refusal] = {}
    for candidate in method.candidates:
        try:
            _check(candidate, METHODS[candidate], start, budget, job, least, candidate=True)
        except (InfeasibleBudget, UnsupportedModel) as error:
            refusals[candidate] = error
    if len(refusals) == len(method.candidates):
        raise refusal(f"no candidate of {name} can be had", refusals)


def skip(name: str, error: InfeasibleBudget, config: SlimConfig) -> None:
    """Say that the comparison goes on without this method, or raise the error: then with its name and the way out."""
    if config.skip_infeasible:
        logger.warning("%s is left out: %s", name, error)
    elif len(config.method) == 1:
        raise error
    else:
        raise InfeasibleBudget(f"{name}: {error}; or leave it out there with --skip-infeasible") from None


def refusal(summary: str, refusals: Mapping[str, Refusal]) -> Refusal:
    """One error for methods none of which can be had."""
    kind = InfeasibleBudget if any(isinstance(e, InfeasibleBudget) for e in refusals.values()) else UnsupportedModel
    return kind(f"{summary}: " + "; ".join(f"{name}: {e}" for name, e in refusals.items()))


def _check(
    name: str, method: Method, start: Starts, budget: Budget, job: Job[SlimConfig], least: dict[str, float],
    *, candidate: bool = False,
) -> None:  # fmt: skip
    try:
        network = start(method.start)
    except NothingToRemove as error:
        if candidate:
            raise
        raise UnsupportedModel(f"{error}; --method residual prunes the network as it is") from None
    cutter = make_cutter(network, method, job, budget, measured=False)
    cutter.check(once=candidate or budget.latency_ratio is not None)
    if budget.memory_ratio is not None:
        cutter.check_memory(budget)
        if budget.name == "memory_ratio":
            return
        budget = dataclasses.replace(budget, memory_ratio=None)
    if budget.latency_ratio is None:
        cutter.hook(cutter.floored(budget), steps=1, epochs=1)
        return
    if cutter.settings.cost == "time" and not cutter.coupled:
        timed_layers(network, network_layers(network, job.data.train.example(1)))
    place = place_of(job)
    limit = NOISE * budget.latency_ratio
    if least.get(name, math.inf) > limit:
        least[name] = place.least_ratio(cutter.narrowest(budget), limit)
    if least[name] > limit:
        raise infeasible(budget.latency_ratio, least[name], place)


def refuse_too_dear(what: str, network: nn.Module, budget: Budget, job: Job[SlimConfig]) -> None:
    """Raise InfeasibleBudget where even this network, `what`, costs more than the budget."""
    cost = cost_ratios(budget, job, {what: network})[what]
    if cost > budget.value * (1.0 if budget.latency_ratio is None else NOISE):
        raise too_dear(what, cost, budget.value)
