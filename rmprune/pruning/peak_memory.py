"""Budgets in peak activation memory: what each channel group holds at each step of the network, and which channels go. Cuts nothing.

A peak is no sum over layers: only what lives at a step that is over the limit helps there. So many bytes over the limit, summed over
steps, are what a cut saves; each step goes to the group that loses the least importance for them, until no step is over it. All other
layers stay as they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from rmprune.errors import InfeasibleBudget, UnsupportedModel, rounded
from rmprune.measure.planner import activation_memory, live_bytes
from rmprune.pruning.allocate import keep_best
from rmprune.pruning.budget import Budget, allowed_widths, even_widths, ratio_within
from rmprune.pruning.groups import Keep, Structure
from rmprune.pruning.surgery import shrink
from rmprune.runs.progress import progress


class ActivationPeaks:
    """Bytes of float32 activations of one image at each step of a network, at any widths. `units`: {group: its units}.

    Raises UnsupportedModel where torch.fx cannot trace the network, or a narrower group changes its steps.
    """

    def __init__(self, model: nn.Module, structure: Structure, example_inputs: Tensor) -> None:
        x = example_inputs[:1]
        self.units = structure.units
        self._whole = np.array(live_bytes(model, x), dtype=np.float64)
        self._each: dict[str, np.ndarray] = {}
        with progress("what each group of channels holds", len(self.units)) as advance:
            for name, units in self.units.items():
                self._each[name] = self._unit(model, structure, x, name, units)
                advance(1)

    def _unit(self, model: nn.Module, structure: Structure, x: Tensor, name: str, units: int) -> np.ndarray:
        """[steps], of one unit: half of them leave, and the rest is counted again."""
        if units < 2:
            return np.zeros_like(self._whole)
        narrow = live_bytes(shrink(model, {name: torch.arange(units) < units // 2}, structure)[0], x)
        if len(narrow) != len(self._whole):
            raise UnsupportedModel(f"{name}: the steps of the network depend on its width; give macs_ratio instead")
        return (self._whole - narrow) / (units - units // 2)

    def live(self, units: Mapping[str, int]) -> np.ndarray:
        """[steps], when the groups keep so many units; one that is absent stays whole."""
        gone = {name: self.units[name] - count for name, count in units.items() if count != self.units[name]}
        return self._whole - sum((count * self._each[name] for name, count in gone.items()), np.zeros_like(self._whole))

    def peak(self, units: Mapping[str, int]) -> float:
        """Bytes at the step where most live."""
        return float(self.live(units).max())

    def least(self, structure: Structure, budget: Budget, origin: Mapping[str, int] | None = None) -> float:
        """The peak with every group as narrow as the limits let it be."""
        return self.peak({name: units[0] for name, units in allowed_widths(structure, budget, origin).items()})

    def allocate(
        self, structure: Structure, importance: Mapping[str, Tensor], budget: Budget, *, uniform: bool = False,
        origin: Mapping[str, int] | None = None,
    ) -> Keep:  # fmt: skip
        """Keep masks {group: bool [units]} that meet `budget.memory_ratio` and the limits. `uniform`: the same fraction of every group.

        Raises InfeasibleBudget with the least that can be had.
        """
        limit = byte_limit(budget)
        if (least := self.least(structure, budget, origin)) > limit:
            raise InfeasibleBudget(self._explain(structure, budget, least, limit, origin))
        allowed = allowed_widths(structure, budget, origin)
        scores = {name: importance[name].double().cpu() for name in allowed}
        units = self._uniform(allowed, limit) if uniform else self._greedy(allowed, scores, limit)
        return {name: keep_best(scores[name], count) for name, count in units.items()}

    def _uniform(self, allowed: Mapping[str, list[int]], limit: float) -> dict[str, int]:
        widths = (even_widths(allowed, self.units, step / 1000) for step in range(1000, -1, -1))
        return next(units for units in widths if self.peak(units) <= limit)

    def _greedy(
        self, allowed: Mapping[str, Sequence[int]], scores: Mapping[str, Tensor], limit: float
    ) -> dict[str, int]:
        kept = {n: [0.0, *s.sort(descending=True).values.cumsum(0).tolist()] for n, s in scores.items()}
        at = {name: len(units) - 1 for name, units in allowed.items()}
        now = {name: units[-1] for name, units in allowed.items()}
        live = self.live(now)

        def step(name: str, to: int) -> tuple[np.ndarray, float]:
            """What lives after this group has gone to position `to`, and the importance lost."""
            units = allowed[name][to]
            return live - (now[name] - units) * self._each[name], kept[name][now[name]] - kept[name][units]

        def take(name: str, to: int) -> np.ndarray:
            after, _ = step(name, to)
            at[name], now[name] = to, allowed[name][to]
            return after

        while (over := _over(live, limit)) > 0:
            offers = []
            for order, name in enumerate(name for name, place in at.items() if place > 0):
                after, lost = step(name, at[name] - 1)
                if (saved := over - _over(after, limit)) > 0:
                    offers.append((lost / saved, order, name))
            *_, name = min(offers)  # never none: with every group at its least no step is over the limit
            live = take(name, at[name] - 1)
        while True:  # blocks that fit come back, the most important first
            back = {n: step(n, place + 1) for n, place in at.items() if place + 1 < len(allowed[n])}
            fits = [(-lost, name) for name, (after, lost) in back.items() if after.max() <= limit]
            if not fits:
                return now
            _, name = max(fits)
            live = take(name, at[name] + 1)

    def _explain(
        self, structure: Structure, budget: Budget, least: float, limit: float, origin: Mapping[str, int] | None
    ) -> str:
        why = (
            "min_channels, min_fraction or round_to forbids it"
            if self.least(structure, budget.without_limits, origin) <= limit
            else "even one channel a layer holds more"
        )
        assert budget.memory_ratio is not None and budget.reference_bytes is not None
        nearest = rounded(ratio_within(least, budget.reference_bytes), 4)
        return (
            f"memory_ratio {budget.memory_ratio:g} cannot be met: {why}. The nearest that can be met under these limits is "
            f"{nearest:.4g} ({least / 1024:.1f} KiB of float32 activations)"
        )


def _over(live: np.ndarray, limit: float) -> float:
    return float(np.maximum(live - limit, 0).sum())


def with_reference(budget: Budget, model: nn.Module, example_inputs: Tensor) -> Budget:
    """A budget of memory that counts against this network, where it does not yet count against another."""
    if budget.memory_ratio is None or budget.reference_bytes is not None:
        return budget
    return replace(budget, reference_bytes=activation_memory(model, example_inputs[:1]).peak_bytes)


def byte_limit(budget: Budget) -> float:
    """Bytes that a budget of memory allows; infinite for any other."""
    return math.inf if budget.memory_ratio is None else budget.memory_ratio * (budget.reference_bytes or math.inf)
