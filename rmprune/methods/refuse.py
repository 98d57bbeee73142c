"""Everything about a method and a budget that can be refused before anything is trained, and how it is said."""

import logging
from collections.abc import Callable, Mapping

from torch import nn

from rmprune.config import SlimConfig
from rmprune.data.load import Dataset
from rmprune.errors import InfeasibleBudget, MissedBudget, UnsupportedModel
from rmprune.measure.layers import network_layers
from rmprune.measure.place import Place, infeasible
from rmprune.methods.cutter import make_cutter
from rmprune.methods.table import Method, alternatives
from rmprune.pruning import Budget
from rmprune.pruning.time_cost import timed_layers

logger = logging.getLogger("rmprune")
Refusal = InfeasibleBudget | UnsupportedModel
NOISE = 1.1  # before training a budget is refused only where it is missed by more than this


def check_budgets(
    networks: Callable[[Method], nn.Module],
    original: nn.Module,
    methods: dict[str, Method],
    budgets: list[Budget],
    config: SlimConfig,
    data: Dataset,
) -> None:
    """Raise before any training: InfeasibleBudget where limits forbid a budget, UnsupportedModel where a method has nothing to work on.

    `networks(method)`: what it prunes, with any weights. Of a method's candidates one that can do it is enough; with
    `config.skip_infeasible` one method is enough for a budget.
    """
    place = Place.first(config.measure, original, data.train.example(1))
    for budget in budgets:
        refusals: dict[str, Refusal] = {}
        for name, method in methods.items():
            try:
                _check_any(name, method, networks, budget, config, data, place)
            except InfeasibleBudget as error:
                skip(name, error, config)
                refusals[name] = error
        if len(refusals) == len(methods):
            raise refusal("no method can be had", refusals)


def _check_any(
    name: str,
    method: Method,
    networks: Callable[[Method], nn.Module],
    budget: Budget,
    config: SlimConfig,
    data: Dataset,
    place: Place,
) -> None:
    """The method itself, or one of its candidates."""
    if not method.candidates:
        _check(networks(method), method, budget, config, data, place)
        return
    refusals: dict[str, Refusal] = {}
    for candidate, one in alternatives(method).items():
        try:
            _check(networks(one), one, budget, config, data, place, candidate=True)
        except (InfeasibleBudget, UnsupportedModel) as error:
            refusals[candidate] = error
    if len(refusals) == len(method.candidates):
        raise refusal(f"no candidate of {name} can be had", refusals)


def skip(name: str, error: InfeasibleBudget, config: SlimConfig) -> None:
    """Say that the comparison goes on without this method, or raise the error: then with its name and the way out."""
    if config.skip_infeasible and not isinstance(error, MissedBudget):
        logger.warning("%s is left out: %s", name, error)
    elif len(config.method) == 1 or isinstance(error, MissedBudget):
        raise error
    else:
        raise InfeasibleBudget(f"{name}: {error}; or leave it out there with --skip-infeasible") from None


def refusal(summary: str, refusals: Mapping[str, Refusal]) -> Refusal:
    """One error for methods none of which can be had."""
    kind = InfeasibleBudget if any(isinstance(e, InfeasibleBudget) for e in refusals.values()) else UnsupportedModel
    return kind(f"{summary}: " + "; ".join(f"{name}: {e}" for name, e in refusals.items()))


def _check(
    network: nn.Module,
    method: Method,
    budget: Budget,
    config: SlimConfig,
    data: Dataset,
    place: Place,
    *,
    candidate: bool = False,
) -> None:
    cutter = make_cutter(network, method, config, data)
    cutter.check(once=candidate or budget.latency_ratio is not None)
    if budget.latency_ratio is None:
        cutter.hook(cutter.floored(budget), steps=1, epochs=1)
        return
    if cutter.settings.cost == "time" and not method.torch_pruning:
        timed_layers(cutter.network, network_layers(cutter.network, cutter.example))
    limit = NOISE * budget.latency_ratio
    if (least := place.least_ratio(cutter.narrowest(budget), limit)) > limit:
        raise infeasible(budget.latency_ratio, least, place)
