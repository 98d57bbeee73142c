"""The policies that a search may choose: allowed widths of every group, their cost, and the hard budget. No learning, no accuracy.

A policy is one width (units kept) for each group of a `Structure`, in the order of the layers; a depthwise layer has its
producer's. The budget is kept at every step by one invariant: what is decided, with everything after it at its lower limit,
meets it. So some allowed width always fits, whatever the rounding, and the last step leaves a policy inside the budget.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmprune.errors import ConfigError, InfeasibleBudget, rounded
from rmprune.pruning.allocate import Meter
from rmprune.pruning.budget import Budget, allowed_units
from rmprune.pruning.groups import Group, Keep, Structure, mask_of
from rmprune.pruning.layers import Cost, SizedLayer, macs

Widths = tuple[int, ...]
"""Units kept of every group, in the space's order."""


def params(layer: SizedLayer, cin: int, cout: int) -> float:
    """Parameters of a layer at these widths once batch norms are folded: its weights and one bias for each output."""
    each = 1 if layer.kind == "depthwise" else cin / layer.groups
    return math.prod(layer.kernel) * each * cout + cout


def params_with(norms: Container[str]) -> Cost:
    """Parameters of a layer at these widths as they are: its weights, its bias where it has one, scale and shift of the batch norm behind
    it where it is one of these layers."""

    def cost(layer: SizedLayer, cin: int, cout: int) -> float:
        return params(layer, cin, cout) + cout * (layer.bias + 2 * (layer.name in norms) - 1)

    return cost


COSTS: dict[str, Cost] = {"macs": macs, "params": params}
"""Costs that need no measurement, by the name of the constraint."""


@dataclass(frozen=True)
class Limits:
    """What a policy may do to a layer: keep at least `lowest` and at most `highest` of it, in multiples of `multiple` channels."""

    lowest: float = 0.1
    highest: float = 1.0
    multiple: int = 8

    def allowed(self, group: Group) -> tuple[int, ...]:
        """Units that the group may keep, ascending; never none. A group without a multiple inside the limits stays whole."""
        rule = Budget(ratio=0.5, min_fraction=self.lowest, max_fraction=self.highest, round_to=self.multiple)
        found = allowed_units(group, rule)
        return tuple(found if self.highest < 1 or found[-1] == group.units else [*found, group.units])


class Space:
    """All policies of one network under one budget.

    structure: the network to be pruned; cost: of one layer at given widths, in the unit of `budget`; budget: what the
    whole network may cost at most, absolute. Raises InfeasibleBudget where the lower limits alone cost more, and
    ConfigError where there is nothing to prune.
    """

    def __init__(self, structure: Structure, cost: Cost, budget: float, limits: Limits) -> None:
        if not structure.groups:
            raise ConfigError("the network has no channels to prune: every group is an output or frozen")
        self.structure, self.budget, self.limits = structure, budget, limits
        position = {layer.name: index for index, layer in enumerate(structure.layers)}
        self.groups = tuple(sorted(structure.groups, key=lambda group: min(position[name] for name in group.producers)))
        self.allowed = tuple(limits.allowed(group) for group in self.groups)
        self.lowest: Widths = tuple(widths[0] for widths in self.allowed)
        self.whole: Widths = tuple(group.units for group in self.groups)
        self.names = tuple(group.name for group in self.groups)
        self.meter = Meter(structure, cost)
        self.full_cost, self.least_cost = self.cost(self.whole), self.cost(self.lowest)
        if self.least_cost > budget:
            raise InfeasibleBudget(
                f"the budget of {budget:.6g} cannot be met: with every layer at its lower limit (lowest={limits.lowest}, "
                f"multiple={limits.multiple}) the network costs {rounded(self.least_cost, 6):.6g}; lower these limits or raise the budget"
            )

    def with_budget(self, budget: float) -> "Space":
        """The same policies under another budget."""
        return Space(self.structure, self.meter.cost, budget, self.limits)

    def layer_costs(self, widths: Sequence[int]) -> list[float]:
        """Cost of every layer of the structure, in its order, when the groups keep `widths`."""
        return self.meter.at(dict(zip(self.names, widths, strict=True)))

    def cost(self, widths: Sequence[int]) -> float:
        """Cost of the whole network when the groups keep `widths`, in the unit of the budget."""
        return sum(self.layer_costs(widths))

    def touching(self, group: int) -> list[int]:
        """Layers (indices) whose cost depends on this group's width."""
        return self.meter.touching[self.names[group]]

    def last_deciders(self) -> list[int]:
        """For every layer the last group that its cost depends on; -1 where it depends on none."""
        last = [-1] * len(self.structure.layers)
        for group in range(len(self.groups)):
            for layer in self.touching(group):
                last[layer] = group
        return last

    def nearest(self, group: int, fraction: float) -> int:
        """The allowed width nearest to this fraction of the group (of two equally near the smaller one)."""
        return min(self.allowed[group], key=lambda width: (abs(width - fraction * self.whole[group]), width))

    def clip(self, decided: Sequence[int], wanted: int) -> int:
        """The largest allowed width, at most `wanted`, of the group after `decided` that leaves the budget reachable.

        Where even the lower limit of this group is `wanted` or less, the result is that limit: it always fits as long as
        `decided` came about by clipping too.
        """
        group = len(decided)
        rest = self.lowest[group + 1 :]
        for width in reversed(self.allowed[group]):
            if width <= wanted and self.cost((*decided, width, *rest)) <= self.budget:
                return width
        return self.lowest[group]

    def execute(self, fractions: Sequence[float]) -> Widths:
        """The policy that comes out when these kept fractions are rounded and clipped group by group."""
        decided: list[int] = []
        for group, fraction in enumerate(fractions):
            decided.append(self.clip(decided, self.nearest(group, fraction)))
        return tuple(decided)

    def fractions(self, widths: Sequence[int]) -> tuple[float, ...]:
        """Kept fraction of every group."""
        return tuple(width / units for width, units in zip(widths, self.whole, strict=True))

    def fit(self, fractions: Sequence[float]) -> Widths:
        """The policy nearest to the shape of `fractions` that uses up the budget: all shrink or grow together towards a limit.

        Unlike `execute`, which takes the budget from the last layers, this spreads it over all.
        """
        low = [width / units for width, units in zip(self.lowest, self.whole, strict=True)]

        def scaled(t: float) -> Widths:  # 0: the lower limits, 1: as asked, 2: everything
            wanted = [a + t * (f - a) if t <= 1 else f + (t - 1) * (1 - f) for a, f in zip(low, fractions, strict=True)]
            return tuple(self.nearest(group, fraction) for group, fraction in enumerate(wanted))

        below, above, best = 0.0, 2.0, self.lowest
        for _ in range(24):
            middle = (below + above) / 2
            widths = scaled(middle)
            if self.cost(widths) <= self.budget:
                below, best = middle, widths
            else:
                above = middle
        return self.fill(self.execute(self.fractions(best)), fractions)

    def fill(self, widths: Sequence[int], fractions: Sequence[float] | None = None) -> Widths:
        """The policy with what rounding left of the budget given back: widths grow a step at a time while they fit.

        The group that is farthest below `fractions` (by default its present width), relative to them, grows first.
        """
        found, wanted = list(widths), fractions or self.fractions(widths)
        steps = [list(allowed).index(width) for allowed, width in zip(self.allowed, found, strict=True)]
        open_groups = set(range(len(found)))
        while open_groups:
            grown = {g: self.allowed[g][steps[g] + 1] for g in open_groups if steps[g] + 1 < len(self.allowed[g])}
            fitting = {g: w for g, w in grown.items() if self.cost((*found[:g], w, *found[g + 1 :])) <= self.budget}
            if not fitting:
                break
            open_groups = set(fitting)  # costs only rise: what does not fit now never will
            best = min(fitting, key=lambda g: (fitting[g] / self.whole[g] / max(wanted[g], 1e-6), g))
            found[best], steps[best] = fitting[best], steps[best] + 1
        return tuple(found)

    def random(self, generator: torch.Generator) -> Widths:
        """A policy drawn at random: independent uniform fractions for the groups, then all scaled to use up the budget."""
        return self.fit(torch.rand(len(self.groups), generator=generator, dtype=torch.float64).tolist())

    def uniform(self) -> Widths:
        """The same kept fraction everywhere (up to rounding), as large as the budget allows."""
        return self.fit([0.0] * len(self.groups))

    def keep(self, widths: Sequence[int], order: dict[str, Tensor]) -> Keep:
        """Keep masks of a policy; `order`: group name -> its units, the most important first."""
        return {
            group.name: mask_of(group.units, order[group.name][:width])
            for group, width in zip(self.groups, widths, strict=True)
        }
