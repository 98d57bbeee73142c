"""A hard budget with limits of each layer, and what both are in absolute numbers for one network. Chooses nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rmprune.config import PruneConfig
from rmprune.config.fields import Settings
from rmprune.config.pruning import BUDGETS
from rmprune.errors import ConfigError, rounded
from rmprune.pruning.groups import Group, Structure, total_cost
from rmprune.pruning.layers import Cost, channels, macs


@dataclass(frozen=True)
class Budget(Settings):
    """What must be met, and the limits of each layer. Exactly one of the ratios is set, or `memory_ratio` beside one: then both hold.

    `ratio`: at least this fraction of the prunable channels is removed. `macs_ratio`: at most this fraction of
    `reference_macs`, the MACs of the *original* network (None: of the network being pruned), stays.
    `latency_ratio`: at most this fraction of `reference_ms` stays, by the cost given to `allocate`. `memory_ratio`: at most
    this fraction of `reference_bytes` (None: as above), the peak of activations that `rmprune.measure.activation_memory` plans. Of
    every layer at least `min_channels` and `min_fraction` and at most `max_fraction` of its channels stay, in
    multiples of `round_to` (a layer with no multiple inside its limits stays whole).

    >>> rmprune.Budget(macs_ratio=0.5, min_channels=4, round_to=8).name
    'macs_ratio'
    >>> rmprune.Budget(ratio=0.5, macs_ratio=0.5)
    Traceback (most recent call last):
    rmprune.errors.ConfigError: a budget is one of ratio, macs_ratio, latency_ratio and memory_ratio, or the last beside one of the \
others; got ratio, macs_ratio
    """

    ratio: float | None = None
    macs_ratio: float | None = None
    latency_ratio: float | None = None
    memory_ratio: float | None = None
    reference_macs: float | None = None
    reference_ms: float | None = None
    reference_bytes: float | None = None
    min_channels: int = 1
    min_fraction: float = 0.0
    max_fraction: float = 1.0
    round_to: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if not given or given[1:] not in ([], ["memory_ratio"]):
            raise ConfigError(
                f"a budget is one of {', '.join(BUDGETS[:-1])} and {BUDGETS[-1]}, or the last beside one of the others; "
                f"got {', '.join(given) or 'none'}"
            )
        for name in given:
            if not 0 < (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must lie between 0 and 1, both excluded; got {value}")
        for name in ("reference_macs", "reference_ms", "reference_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is a positive number, or None for the network being pruned; got {value}")
        if self.min_channels < 1 or self.round_to < 1:
            raise ConfigError(f"min_channels and round_to are at least 1; got {self.min_channels} and {self.round_to}")
        if not 0 <= self.min_fraction <= self.max_fraction <= 1:
            raise ConfigError(
                f"need 0 <= min_fraction <= max_fraction <= 1; got {self.min_fraction} and {self.max_fraction}"
            )

    @classmethod
    def from_config(
        cls, config: PruneConfig, name: str, value: float, *, reference_macs: float | None = None
    ) -> "Budget":
        """One of `config.budgets` (name, value) with the config's limits, against the original network's MACs."""
        return cls(
            **{"memory_ratio": config.memory_beside, name: value},
            reference_macs=reference_macs,
            min_channels=config.min_channels,
            min_fraction=config.min_fraction or 0.0,
            max_fraction=config.max_fraction,
            round_to=config.round_to,
        )

    @property
    def name(self) -> str:
        """Which of the ratios is set; of two, the one that memory_ratio holds beside."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """That ratio."""
        return float(getattr(self, self.name))

    @property
    def without_limits(self) -> "Budget":
        """The same with no least width of a layer: one channel is enough."""
        return replace(self, min_channels=1, min_fraction=0.0, round_to=1)


def refuse_no_budget(budget: object) -> None:
    """Raises ConfigError for what is none."""
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget says what to meet, such as rmprune.Budget(macs_ratio=0.5); got {budget!r}")


@dataclass(frozen=True)
class Target:
    """A budget in absolute numbers: `cost` summed over the layers must not exceed `limit`. `whole`: what the ratio counts against."""

    cost: Cost
    limit: float
    whole: float

    def as_ratio(self, budget: Budget, value: float) -> float:
        """The setting of `budget` that `value` corresponds to."""
        return (self.whole - value) / self.whole if budget.ratio is not None else value / self.whole

    def nearest(self, budget: Budget, value: float) -> float:
        """The same in four digits, rounded to the side on which `value` is within it."""
        if budget.ratio is not None:
            return rounded(self.as_ratio(budget, value), 4, up=False)
        return rounded(ratio_within(value, self.whole), 4)


def ratio_within(value: float, whole: float) -> float:
    """The least ratio of which `whole` is no less than `value`, whatever floating point makes of the product."""
    ratio = value / whole
    return ratio if ratio * whole >= value else math.nextafter(ratio, math.inf)


def resolve(structure: Structure, budget: Budget, cost: Cost | None = None, *, memory: bool = False) -> Target:
    """The budget of this network in absolute numbers. `cost` replaces MACs for `latency_ratio`, in the unit of
    `reference_ms`. `memory`: the caller sees to a `memory_ratio` beside it; raises ConfigError where nobody does.
    """
    refuse_no_budget(budget)
    if budget.memory_ratio is not None and not (memory and budget.name != "memory_ratio"):
        raise ConfigError(
            "memory_ratio is met by one cut of ours: not while training, not by Torch-Pruning, and by auto only beside macs_ratio or "
            "latency_ratio; take --no-gradual, and a method such as rm or residual"
        )
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


def allowed_widths(
    structure: Structure, budget: Budget, origin: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """{group: `allowed_units`}; `origin`: original sizes, of groups that had others."""
    return {g.name: allowed_units(g, budget, (origin or {}).get(g.name)) for g in structure.groups}


def even_widths(allowed: Mapping[str, list[int]], whole: Mapping[str, int], fraction: float) -> dict[str, int]:
    """{group: of the units that are `allowed`, those nearest to this fraction of the `whole`}."""
    return {name: min(us, key=lambda units: abs(units - fraction * whole[name])) for name, us in allowed.items()}


def allowed_units(group: Group, budget: Budget, origin: int | None = None) -> list[int]:
    """The numbers of units that a group may keep, ascending. Limits refer to its original size `origin`."""
    k, whole = group.multiple, (origin or group.units) * group.multiple
    low = max(budget.min_channels, math.ceil(budget.min_fraction * whole - 1e-9), 1)
    high = max(low, math.floor(budget.max_fraction * whole + 1e-9))
    step = math.lcm(k, budget.round_to) // k
    found = [u for u in range(step, group.units + 1, step) if low <= u * k <= high]
    return found or [group.units]
