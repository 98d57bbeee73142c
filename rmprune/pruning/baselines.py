"""Simple widths that free pruning is compared with: inner channels only, and the same fraction everywhere."""

from collections.abc import Mapping

from torch import Tensor

from rmprune.errors import InfeasibleBudget
from rmprune.pruning.budget import Budget, Target, allowed_units, explain
from rmprune.pruning.greedy import Meter, keep_best
from rmprune.pruning.structure import Keep, Structure


def inner_only(structure: Structure) -> Structure:
    """Only channels inside blocks may go, as in ThiNet: every group that several layers add into (a residual stream)
    is left whole.
    """
    return structure.without({g.name: "a residual stream" for g in structure.groups if len(g.producers) > 1})


def allocate_uniform(
    structure: Structure,
    importance: Mapping[str, Tensor],
    budget: Budget,
    *,
    target: Target,
    origin: Mapping[str, int] | None = None,
) -> Keep:
    """The same fraction of every group, its most important units: the largest fraction within the budget and the
    limits.
    """
    allowed = {g.name: allowed_units(g, budget, (origin or {}).get(g.name)) for g in structure.groups}
    whole = {g.name: (origin or structure.units)[g.name] for g in structure.groups}

    def widths(fraction: float) -> dict[str, int]:
        return {n: max((u for u in us if u <= fraction * whole[n] + 1e-9), default=us[0]) for n, us in allowed.items()}

    def cost(fraction: float) -> float:
        meter = Meter(structure, target.cost)
        for name, units in widths(fraction).items():
            meter.place(name, units)
        return meter.total

    low, high = 0.0, 1.0
    if cost(low) > target.limit:
        raise InfeasibleBudget(explain(structure, budget, target, origin))
    if cost(high) <= target.limit:
        low = high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target.limit else (low, middle)
    return {name: keep_best(importance[name].double().cpu(), units) for name, units in widths(low).items()}
