"""Which channels go: a global, greedy allocation under a hard budget with per-layer limits and channel multiples.

Changes no model.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmprune.config import PruneConfig
from rmprune.errors import ConfigError, InfeasibleBudget
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
            min_fraction=config.min_fraction,
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
    rounded: bool = True,
) -> Keep:
    """Keep masks {group: bool [units]} that meet the budget.

    Greedy: the block whose importance per cost saved is least goes next (``rank="importance"``: per channel, the one
    global threshold of network slimming); savings are recomputed as neighbours shrink; at the end blocks that still
    fit come back. Ties go by saving, then by the order of groups and channels. ``lookahead``: how many blocks ahead
    to look where cost is not monotone in width (measured times). ``origin``: units that the limits refer to, where
    the network has been cut before; ``rounded=False`` leaves the multiples to a later cut. ``target`` overrides the
    budget's own.

    Raises InfeasibleBudget naming the limit that forbids it and the nearest budget that can be met.
    """
    if rank not in ("per_cost", "importance"):
        raise ConfigError(f"rank must be 'per_cost' or 'importance', got {rank!r}")
    target = target or resolve(structure, budget, cost)
    widths = {g.name: allowed_units(g, budget, (origin or {}).get(g.name), rounded) for g in structure.groups}
    search = _Search(structure, importance, target.cost, widths, rank, lookahead)
    if not search.shrink_to(target.limit):
        raise InfeasibleBudget(explain(structure, budget, target, origin))
    search.fill(target.limit)
    return search.keep()


def allowed_units(group: Group, budget: Budget, origin: int | None = None, rounded: bool = True) -> list[int]:
    """The numbers of units that a group may keep, ascending. Limits refer to its original size ``origin``.

    With ``rounded=False`` any number from the lowest allowed one on, so that a later, rounded cut can still meet the
    limits.
    """
    k, whole = group.multiple, (origin or group.units) * group.multiple
    low = max(budget.min_channels, math.ceil(budget.min_fraction * whole - 1e-9), 1)
    high = max(low, math.floor(budget.max_fraction * whole + 1e-9))
    step = math.lcm(k, budget.round_to) // k
    found = [u for u in range(step, group.units + 1, step) if low <= u * k <= high]
    if not rounded and found:
        return list(range(found[0], min(group.units, max(high // k, found[0])) + 1))
    return found or [group.units]


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the ``count`` largest scores; of equal ones, the first stay."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return mask


class Meter:
    """The network's cost at any widths, kept up to date one group at a time."""

    def __init__(self, structure: Structure, cost: Cost) -> None:
        self.cost = cost
        self.layers = structure.layers
        self.units = dict(structure.units)
        at = self.units
        self.fixed = [
            (x.cin - sum(at[g] * k for g, k in x.inputs), x.cout - sum(at[g] * k for g, k in x.outputs))
            for x in self.layers
        ]
        self.touching: dict[str, list[int]] = {name: [] for name in self.units}
        for i, layer in enumerate(self.layers):
            for name in {g for g, _ in (*layer.inputs, *layer.outputs)}:
                self.touching[name].append(i)
        self.costs = [self._layer(i) for i in range(len(self.layers))]
        self.total = math.fsum(self.costs)

    def _layer(self, i: int) -> float:
        layer, units = self.layers[i], self.units
        cin, cout = self.fixed[i]
        for name, k in layer.inputs:
            cin += units[name] * k
        for name, k in layer.outputs:
            cout += units[name] * k
        return self.cost(layer, cin, cout)

    def change(self, name: str, units: int) -> float:
        """How much the total would grow if this group had ``units``."""
        before, self.units[name] = self.units[name], units
        difference = sum(self._layer(i) - self.costs[i] for i in self.touching[name])
        self.units[name] = before
        return difference

    def place(self, name: str, units: int) -> None:
        self.units[name] = units
        for i in self.touching[name]:
            self.costs[i] = self._layer(i)
        self.total = math.fsum(self.costs)

    def neighbours(self, name: str) -> set[str]:
        """Groups that share a layer with this one, itself included."""
        return {g for i in self.touching[name] for g, _ in (*self.layers[i].inputs, *self.layers[i].outputs)}


class _Search:
    """The greedy descent and the filling-up after it."""

    def __init__(
        self,
        structure: Structure,
        importance: Mapping[str, Tensor],
        cost: Cost,
        widths: Mapping[str, Sequence[int]],
        rank: str,
        lookahead: int,
    ) -> None:
        self.scores = {g.name: importance[g.name].double().cpu() for g in structure.groups}
        self.channels = {g.name: g.channels for g in structure.groups}
        self.order = {g.name: i for i, g in enumerate(structure.groups)}
        # kept[name][u]: the importance of the u best units
        self.kept = {
            n: torch.cat([s.new_zeros(1), s.sort(descending=True).values.cumsum(0)]).tolist()
            for n, s in self.scores.items()
        }
        self.meter = Meter(structure, cost)
        self.widths = {n: list(w) for n, w in widths.items()}
        self.at = {n: len(w) - 1 for n, w in self.widths.items()}  # position in widths
        for name, allowed in self.widths.items():
            if allowed[-1] != self.meter.units[name]:
                self.meter.place(name, allowed[-1])
        self.near = {n: self.meter.neighbours(n) for n in self.widths}
        self.rank, self.lookahead = rank, lookahead

    def keep(self) -> Keep:
        return {n: keep_best(s, self.meter.units[n]) for n, s in self.scores.items()}

    def _offer(self, name: str) -> tuple[float, float, int, int] | None:
        """(importance lost per cost, -saving, order, new position) of this group's best next step down."""
        here, best = self.at[name], None
        now = self.widths[name][here]
        for to in range(here - 1, max(here - 1 - self.lookahead, -1), -1):
            units = self.widths[name][to]
            saving = -self.meter.change(name, units)
            if saving <= 0:
                continue
            per = saving if self.rank == "per_cost" else (now - units) * self.channels[name]
            offer = ((self.kept[name][now] - self.kept[name][units]) / per, -saving, self.order[name], to)
            best = offer if best is None or offer < best else best
        return best

    def shrink_to(self, limit: float) -> bool:
        """Remove until the total cost is at most ``limit``; False where nothing more may go."""
        version = dict.fromkeys(self.widths, 0)
        names = list(self.widths)
        heap = [(offer, 0, n) for n in names if (offer := self._offer(n)) is not None]
        heapq.heapify(heap)
        while self.meter.total > limit:
            if not heap:
                return False
            offer, stamp, name = heapq.heappop(heap)
            if stamp != version[name]:
                continue
            self.at[name] = offer[3]
            self.meter.place(name, self.widths[name][offer[3]])
            for other in self.near[name]:
                version[other] += 1
                renewed = self._offer(other)
                if renewed is not None:
                    heapq.heappush(heap, (renewed, version[other], other))
        return True

    def fill(self, limit: float) -> None:
        """Give blocks back while they fit, the most important per cost first."""
        while True:
            best: tuple[float, int, str] | None = None
            for name, allowed in self.widths.items():
                to = self.at[name] + 1
                if to == len(allowed):
                    continue
                growth = self.meter.change(name, allowed[to])
                gain = self.kept[name][allowed[to]] - self.kept[name][self.meter.units[name]]
                if gain <= 0 or self.meter.total + growth > limit:
                    continue
                offer = (gain / max(growth, 1e-12), -self.order[name], name)
                best = offer if best is None or offer > best else best
            if best is None:
                return
            self.at[best[2]] += 1
            self.meter.place(best[2], self.widths[best[2]][self.at[best[2]]])


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
