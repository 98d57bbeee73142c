"""Which channels go: a global, greedy allocation under a hard budget with per-layer limits and channel multiples.

Changes no model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from rmprune.config import PruneConfig
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.pruning.greedy import Meter, Search
from rmprune.pruning.greedy import keep_best as keep_best
from rmprune.pruning.structure import Cost, Group, Keep, Structure, channels, macs, total_cost


@dataclass(frozen=True)
class Budget:
    """What must be met, and the limits of each layer. Exactly one of the three ratios is set.

    ``ratio``: at least this fraction of the prunable channels is removed. ``macs_ratio``: at most this fraction of
    ``reference_macs``, the MACs of the *original* network (None: of the network being pruned), stays.
    ``latency_ratio``: at most this fraction of ``reference_ms`` stays, by the cost given to :func:`allocate`. Of
    every layer at least ``min_channels`` and ``min_fraction`` and at most ``max_fraction`` of its channels stay, in
    multiples of ``round_to`` (a layer with no multiple inside its limits stays whole).
    """

    ratio: float | None = None
    macs_ratio: float | None = None
    latency_ratio: float | None = None
    reference_macs: float | None = None
    reference_ms: float | None = None
    min_channels: int = 1
    min_fraction: float = 0.0
    max_fraction: float = 1.0
    round_to: int = 1

    def __post_init__(self) -> None:
        given = [n for n in ("ratio", "macs_ratio", "latency_ratio") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"a budget is exactly one of ratio, macs_ratio and latency_ratio; got {', '.join(given) or 'none'}"
            )
        value = getattr(self, given[0])
        if not 0 < value < 1:
            raise ConfigError(f"{given[0]} must lie between 0 and 1, both excluded; got {value}")
        if self.min_channels < 1 or self.round_to < 1:
            raise ConfigError(f"min_channels and round_to are at least 1; got {self.min_channels} and {self.round_to}")
        if not 0 <= self.min_fraction <= self.max_fraction <= 1:
            raise ConfigError(
                f"need 0 <= min_fraction <= max_fraction <= 1; got {self.min_fraction} and {self.max_fraction}"
            )

    @classmethod
    def from_config(
        cls,
        config: PruneConfig,
        name: str,
        value: float,
        *,
        reference_macs: float | None = None,
        reference_ms: float | None = None,
    ) -> "Budget":
        """One of ``config.budgets`` (name, value) with the config's limits, against the original network's figures."""
        return cls(
            **{name: value},
            reference_macs=reference_macs,
            reference_ms=reference_ms,
            min_channels=config.min_channels,
            min_fraction=config.min_fraction or 0.0,
            max_fraction=config.max_fraction,
            round_to=config.round_to,
        )

    @property
    def name(self) -> str:
        """Which of the three ratios is set."""
        return next(n for n in ("ratio", "macs_ratio", "latency_ratio") if getattr(self, n) is not None)


@dataclass(frozen=True)
class Target:
    """A budget in absolute numbers: ``cost`` summed over the layers must not exceed ``limit``. ``whole``: what the
    ratio counts against.
    """

    cost: Cost
    limit: float
    whole: float

    def as_ratio(self, budget: Budget, value: float) -> float:
        """The setting of ``budget`` that ``value`` corresponds to."""
        return 1 - value / self.whole if budget.ratio is not None else value / self.whole


def resolve(structure: Structure, budget: Budget, cost: Cost | None = None) -> Target:
    """The budget of this network in absolute numbers. ``cost`` replaces MACs for ``latency_ratio``, in the unit of
    ``reference_ms``.
    """
    if budget.ratio is not None:
        whole = total_cost(structure, channels)
        return Target(channels, (1 - budget.ratio) * whole + 1e-9, whole)
    if budget.macs_ratio is not None:
        whole = budget.reference_macs or total_cost(structure, macs)
        return Target(macs, budget.macs_ratio * whole, whole)
    if cost is None or budget.latency_ratio is None:
        raise ConfigError("latency_ratio needs a cost in milliseconds: pass the latency model's cost")
    whole = budget.reference_ms or total_cost(structure, cost)
    return Target(cost, budget.latency_ratio * whole, whole)


def allocate(
    structure: Structure,
    importance: Mapping[str, Tensor],
    budget: Budget,
    cost: Cost | None = None,
    *,
    target: Target | None = None,
    origin: Mapping[str, int] | None = None,
    rank: str = "per_cost",
    lookahead: int = 1,
) -> Keep:
    """Keep masks {group: bool [units]} that meet the budget.

    Greedy: the block whose importance per cost saved is least goes next (the budget's cost; MACs where the budget
    counts channels). ``rank="importance"``: importance per channel, the one global threshold of network slimming;
    savings are recomputed as neighbours shrink; at the end blocks that still fit come back. Ties go by saving, then
    by the order of groups and channels. ``lookahead``: how many blocks ahead to look where cost is not monotone in
    width (measured times). ``origin``: units that the limits refer to, where the network has been cut before.
    ``target`` overrides the budget's own.

    Raises InfeasibleBudget naming the limit that forbids it and the nearest budget that can be met.
    """
    if rank not in ("per_cost", "importance"):
        raise ConfigError(f"rank must be 'per_cost' or 'importance', got {rank!r}")
    target = target or resolve(structure, budget, cost)
    widths = {g.name: allowed_units(g, budget, (origin or {}).get(g.name)) for g in structure.groups}
    search = Search(structure, importance, target.cost, widths, rank, lookahead)
    if not search.shrink_to(target.limit):
        raise InfeasibleBudget(explain(structure, budget, target, origin))
    search.fill(target.limit)
    return search.keep()


def even_fraction(structure: Structure, budget: Budget, cost: Cost | None = None) -> float:
    """The fraction of its channels that every layer would keep if all were cut evenly: MACs go with its square."""
    target = resolve(structure, budget, cost)
    fraction = min(1.0, target.limit / total_cost(structure, target.cost))
    return fraction if budget.ratio is not None else fraction**0.5


def allowed_units(group: Group, budget: Budget, origin: int | None = None) -> list[int]:
    """The numbers of units that a group may keep, ascending. Limits refer to its original size ``origin``."""
    k, whole = group.multiple, (origin or group.units) * group.multiple
    low = max(budget.min_channels, math.ceil(budget.min_fraction * whole - 1e-9), 1)
    high = max(low, math.floor(budget.max_fraction * whole + 1e-9))
    step = math.lcm(k, budget.round_to) // k
    found = [u for u in range(step, group.units + 1, step) if low <= u * k <= high]
    return found or [group.units]


def least_cost(structure: Structure, budget: Budget, cost: Cost, origin: Mapping[str, int] | None = None) -> float:
    """The cost with every group as narrow as the limits let it be."""
    meter = Meter(structure, cost)
    for group in structure.groups:
        meter.place(group.name, allowed_units(group, budget, (origin or {}).get(group.name))[0])
    return meter.total


def explain(structure: Structure, budget: Budget, target: Target, origin: Mapping[str, int] | None = None) -> str:
    """Which limit forbids the budget, and what can be had under the limits as they are."""
    least = least_cost(structure, budget, target.cost, origin)
    asked, nearest = getattr(budget, budget.name), target.as_ratio(budget, least)
    free = {
        "min_channels": replace(budget, min_channels=1),
        "min_fraction": replace(budget, min_fraction=0.0),
        "round_to": replace(budget, round_to=1),
    }
    guilty = [
        f"{limit}={getattr(budget, limit)}"
        for limit, relaxed in free.items()
        if relaxed != budget and least_cost(structure, relaxed, target.cost, origin) <= target.limit
    ]
    bare = replace(budget, min_channels=1, min_fraction=0.0, round_to=1)
    if guilty:
        why = f"{' or '.join(guilty)} forbids it"
    elif least_cost(structure, bare, target.cost, origin) <= target.limit:
        why = "min_channels, min_fraction and round_to together forbid it"
    else:
        whole = ", ".join(name for name, reason in structure.frozen.items() if "output" not in reason)
        why = "even one channel a layer costs more" + (f" (left whole: {whole})" if whole else "")
    return (
        f"{budget.name} {asked:g} cannot be met: {why}. The nearest that can be met under these limits is {nearest:.4g}"
    )
