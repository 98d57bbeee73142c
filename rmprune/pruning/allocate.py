"""Which channels go under a budget: a greedy, global descent, and the cost of a network at any widths. Changes no model."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.pruning.budget import Budget, Target, allowed_widths, even_widths, resolve
from rmprune.pruning.groups import Keep, Structure, mask_of, total_cost
from rmprune.pruning.layers import Cost, channels, macs, price


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest scores; of equal ones, the first stay."""
    return mask_of(len(scores), torch.argsort(scores.cpu(), descending=True, stable=True)[:count])


class Meter:
    """The network's cost at any widths (units kept of each group); for a descent kept up to date one group at a time."""

    def __init__(self, structure: Structure, cost: Cost) -> None:
        self.cost, self.layers = cost, structure.layers
        self.units = at = dict(structure.units)
        self.fixed = [
            (x.cin - sum(at[g] * k for g, k in x.inputs), x.cout - sum(at[g] * k for g, k in x.outputs))
            for x in self.layers
        ]
        self.touching: dict[str, list[int]] = {name: [] for name in at}
        for i, layer in enumerate(self.layers):
            for name in {g for g, _ in (*layer.inputs, *layer.outputs)}:
                self.touching[name].append(i)
        self._known: dict[tuple[int, int, int], float] = {}
        self.costs = self.at(at)
        self.total = math.fsum(self.costs)

    def at(self, units: Mapping[str, int]) -> list[float]:
        """The cost of every layer, in the structure's order, when the groups keep so many units."""
        return [self._layer(i, units) for i in range(len(self.layers))]

    def _layer(self, i: int, units: Mapping[str, int]) -> float:
        layer, (cin, cout) = self.layers[i], self.fixed[i]
        for name, k in layer.inputs:
            cin += units[name] * k
        for name, k in layer.outputs:
            cout += units[name] * k
        if (i, cin, cout) not in self._known:
            self._known[i, cin, cout] = price(self.cost, layer, cin, cout)
        return self._known[i, cin, cout]

    def change(self, name: str, units: int) -> float:
        """How much the total would grow if this group had `units`."""
        before, self.units[name] = self.units[name], units
        difference = sum(self._layer(i, self.units) - self.costs[i] for i in self.touching[name])
        self.units[name] = before
        return difference

    def place(self, name: str, units: int) -> None:
        """Let this group have `units` from now on."""
        self.units[name] = units
        for i in self.touching[name]:
            self.costs[i] = self._layer(i, self.units)
        self.total = math.fsum(self.costs)

    def neighbours(self, name: str) -> set[str]:
        """Groups that share a layer with this one, itself included."""
        return {g for i in self.touching[name] for g, _ in (*self.layers[i].inputs, *self.layers[i].outputs)}


class GreedySearch:
    """The greedy descent and the filling-up after it."""

    def __init__(
        self, structure: Structure, importance: Mapping[str, Tensor], cost: Cost, widths: Mapping[str, Sequence[int]],
        rank: str, lookahead: int,
    ) -> None:  # fmt: skip
        self.scores = {g.name: importance[g.name].double().cpu() for g in structure.groups}
        self.channels = {g.name: g.channels for g in structure.groups}
        self.order = {g.name: i for i, g in enumerate(structure.groups)}
        # kept[name][u]: the importance of the u best units
        self.kept = {
            n: torch.cat([s.new_zeros(1), s.sort(descending=True).values.cumsum(0)]).tolist()
            for n, s in self.scores.items()
        }
        self.meter = Meter(structure, cost)
        # What a channel is worth is its price: where the budget counts channels, that is still the MACs it takes.
        self.price = Meter(structure, macs) if cost is channels else self.meter
        self.widths: Mapping[str, Sequence[int]] = widths
        self.at = {n: len(w) - 1 for n, w in self.widths.items()}  # position in widths
        for name, allowed in self.widths.items():
            if allowed[-1] != self.meter.units[name]:
                self._place(name, allowed[-1])
        self.near = {n: self.meter.neighbours(n) for n in self.widths}
        self.rank, self.lookahead = rank, lookahead

    def _place(self, name: str, units: int) -> None:
        self.meter.place(name, units)
        if self.price is not self.meter:
            self.price.place(name, units)

    def keep(self) -> Keep:
        """The masks of the widths reached so far: the best-scored units of each group."""
        return {n: keep_best(s, self.meter.units[n]) for n, s in self.scores.items()}

    def _offer(self, name: str, lookahead: int) -> tuple[float, float, int, int] | None:
        """(importance lost per cost, -saving, order, new position) of this group's best step down by up to so many blocks."""
        here, best = self.at[name], None
        now = self.widths[name][here]
        for to in range(here - 1, max(here - 1 - lookahead, -1), -1):
            units = self.widths[name][to]
            saving = -self.price.change(name, units)
            if saving <= 0:
                continue
            per = saving if self.rank == "per_cost" else (now - units) * self.channels[name]
            offer = ((self.kept[name][now] - self.kept[name][units]) / per, -saving, self.order[name], to)
            best = offer if best is None or offer < best else best
        return best

    def shrink_to(self, limit: float) -> bool:
        """Remove until the total cost is at most `limit`; False where nothing more may go."""
        version = dict.fromkeys(self.widths, 0)
        names = list(self.widths)
        heap = [(offer, 0, n) for n in names if (offer := self._offer(n, self.lookahead)) is not None]
        heapq.heapify(heap)
        while self.meter.total > limit:
            if heap:
                offer, stamp, name = heapq.heappop(heap)
                if stamp != version[name]:
                    continue
                to = offer[3]
            elif (step := self._step_over()) is not None:
                name, to = step
            else:
                return False
            self.at[name] = to
            self._place(name, self.widths[name][to])
            for other in self.near[name]:
                version[other] += 1
                renewed = self._offer(other, self.lookahead)
                if renewed is not None:
                    heapq.heappush(heap, (renewed, version[other], other))
        return True

    def _step_over(self) -> tuple[str, int] | None:
        """(group, new position) where no near step saves anything, as measured times can have it: the best saving further down,
        or else the block of the least importance, whatever it costs. None where all are as narrow as they may be.
        """
        further = [(offer, n) for n in self.widths if (offer := self._offer(n, len(self.widths[n]))) is not None]
        if further:
            offer, name = min(further)
            return name, offer[3]
        blocks = []
        for name, here in self.at.items():
            if here > 0:
                now, units = self.widths[name][here], self.widths[name][here - 1]
                lost = (self.kept[name][now] - self.kept[name][units]) / ((now - units) * self.channels[name])
                blocks.append((lost, self.order[name], name, here - 1))
        return min(blocks)[2:] if blocks else None

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
                price = self.price.change(name, allowed[to])
                offer = (gain / max(price, 1e-12), -self.order[name], name)
                best = offer if best is None or offer > best else best
            if best is None:
                return
            self.at[best[2]] += 1
            self._place(best[2], self.widths[best[2]][self.at[best[2]]])


def allocate_uniform(
    structure: Structure, importance: Mapping[str, Tensor], budget: Budget, *, target: Target,
    origin: Mapping[str, int] | None = None,
) -> Keep:  # fmt: skip
    """The same fraction of every group, its most important units: the largest fraction within the budget and the
    limits, each group at the allowed width nearest to it (with `round_to` some may stay whole). Raises InfeasibleBudget where the limits
    forbid the budget.
    """
    allowed = allowed_widths(structure, budget, origin)
    meter, whole = Meter(structure, target.cost), origin or structure.units

    def cost(fraction: float) -> float:
        return math.fsum(meter.at(even_widths(allowed, whole, fraction)))

    low, high = 0.0, 1.0
    if cost(low) > target.limit:
        raise InfeasibleBudget(explain(structure, budget, target, origin))
    if cost(high) <= target.limit:
        low = high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target.limit else (low, middle)
    return {name: keep_best(importance[name], units) for name, units in even_widths(allowed, whole, low).items()}


def allocate(
    structure: Structure, importance: Mapping[str, Tensor], budget: Budget, cost: Cost | None = None, *,
    target: Target | None = None, origin: Mapping[str, int] | None = None, rank: str = "per_cost", lookahead: int = 1,
    begin: Mapping[str, int] | None = None, most: Mapping[str, int] | None = None,
) -> Keep:  # fmt: skip
    """Keep masks {group: bool [units]} that meet the budget.

    Greedy: the block whose importance per cost saved is least goes next (the budget's cost; MACs where the budget
    counts channels). `rank="importance"`: importance per channel, the one global threshold of network slimming;
    savings are recomputed as neighbours shrink; at the end blocks that still fit come back. Ties go by saving, then
    by the order of groups and channels. `lookahead`: how many blocks ahead to look where cost is not monotone in
    width (measured times). `origin`: units that the limits refer to, where the network has been cut before.
    `target` overrides the budget's own. `begin`: {group: units} to descend from, of a plan that may cost a little more or less.
    `most`: {group: units} that it may keep.

    Raises InfeasibleBudget naming the limit that forbids it and the nearest budget that can be met.
    """
    if rank not in ("per_cost", "importance"):
        raise ConfigError(f"rank must be 'per_cost' or 'importance', got {rank!r}")
    target = target or resolve(structure, budget, cost)
    widths = allowed_widths(structure, budget, origin)
    widths = {n: [u for u in us if u <= (most or {}).get(n, us[-1])] for n, us in widths.items()}
    start = {n: [u for u in us if u <= (begin or {}).get(n, us[-1])] or us[:1] for n, us in widths.items()}
    search = GreedySearch(structure, importance, target.cost, start, rank, lookahead)
    if not search.shrink_to(target.limit):
        raise InfeasibleBudget(explain(structure, budget, target, origin))
    search.widths = widths
    search.fill(target.limit)
    return search.keep()


def even_fraction(structure: Structure, budget: Budget, cost: Cost | None = None) -> float:
    """The fraction of its channels that every layer would keep if all were cut evenly: MACs go with its square."""
    target = resolve(structure, budget, cost, memory=True)
    fraction = min(1.0, target.limit / total_cost(structure, target.cost))
    return fraction if budget.ratio is not None else fraction**0.5


def least_cost(structure: Structure, budget: Budget, cost: Cost, origin: Mapping[str, int] | None = None) -> float:
    """The cost with every group as narrow as the limits let it be."""
    least = {name: units[0] for name, units in allowed_widths(structure, budget, origin).items()}
    return math.fsum(Meter(structure, cost).at(least))


def explain(structure: Structure, budget: Budget, target: Target, origin: Mapping[str, int] | None = None) -> str:
    """Which limit forbids the budget, and what can be had under the limits as they are."""
    least = least_cost(structure, budget, target.cost, origin)
    nearest = target.nearest(budget, least)
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
    if guilty:
        why = f"{' or '.join(guilty)} forbids it"
    elif least_cost(structure, budget.without_limits, target.cost, origin) <= target.limit:
        why = "min_channels, min_fraction and round_to together forbid it"
    else:
        whole = ", ".join(name for name, reason in structure.frozen.items() if "output" not in reason)
        why = "even one channel a layer costs more" + (f" (left whole: {whole})" if whole else "")
        rest = sum(layer.maps for layer in structure.layers if layer.kind == "rest" and budget.macs_ratio is not None)
        why += f"; {rest / target.whole:.1%} of the MACs are in operations without channels to cut" if rest else ""
    return f"{budget.name} {budget.value:g} cannot be met: {why}. The nearest that can be met under these limits is {nearest:.4g}"
