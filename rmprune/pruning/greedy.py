"""The greedy search under a budget: costs kept up to date as groups shrink, blocks removed and given back. No limits."""

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rmprune.pruning.structure import Cost, Keep, Structure, channels, macs


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


class Search:
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
        # What a channel is worth is its price: where the budget counts channels, that is still the MACs it takes.
        self.price = Meter(structure, macs) if cost is channels else self.meter
        self.widths = {n: list(w) for n, w in widths.items()}
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
        """Remove until the total cost is at most ``limit``; False where nothing more may go."""
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
